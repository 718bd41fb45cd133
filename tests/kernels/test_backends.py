"""Which implementation serves a call: one registry for all public operations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import (
    AttentionOptions,
    ContinuedTokens,
    Memory,
    backends,
    continue_attention,
    decode_memory,
    nha_attention,
    nha_decode_step,
)
from nha_kernels.backends import choose_backend, register_backend
from nha_kernels.chunked import chunked_attention
from tests.kernels.operator_cases import random_inputs

OPERATIONS = ("attention", "continuation", "decode", "summary", "statistics")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A copy for the test to change."""
    copy = {operation: dict(offered) for operation, offered in backends._BACKENDS.items()}
    monkeypatch.setattr(backends, "_BACKENDS", copy)
    yield copy


def call_of(operation: str) -> tuple[Any, ...]:
    q, k, v, g = random_inputs(4).tensors
    memory = decode_memory(Memory.empty(1, 2, 5, 12, 8, 3, dtype=q.dtype))
    return {"summary": (k, v, g), "decode": (q, k, v, g, memory)}.get(operation, (q, k, v, g, 3))


def test_every_operation_has_its_backends(registry: dict[str, Any]) -> None:
    assert {operation: set(offered) for operation, offered in registry.items()} == {
        "attention": {"reference", "torch", "triton"},
        "continuation": {"triton"},
        "decode": {"triton"},
        "summary": {"torch", "triton"},
        "statistics": {"torch"},
    }


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_takes_pytorch_on_the_cpu(operation: str, registry: dict[str, Any]) -> None:
    """Where an operation has no PyTorch form of its own it goes through attention."""
    assert choose_backend(operation, "auto", *call_of(operation)) is registry[operation].get("torch")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_takes_a_backend_that_does_not_refuse(operation: str) -> None:
    calls = []
    register_backend("new", lambda: None, lambda *call: calls.append(call), operation=operation)
    chosen = choose_backend(operation, "auto", *call_of(operation))
    assert chosen is backends._BACKENDS[operation]["new"] and len(calls) == 1 and len(calls[0]) == len(call_of(operation))
    register_backend("new", lambda: None, lambda *call: "not today", operation=operation)
    assert choose_backend(operation, "auto", *call_of(operation)) is not backends._BACKENDS[operation]["new"]
    register_backend("new", lambda: None, operation=operation)  # without `refuses` only who asks for it gets it
    assert choose_backend(operation, "auto", *call_of(operation)) is not backends._BACKENDS[operation]["new"]
    assert choose_backend(operation, "new", *call_of(operation)) is backends._BACKENDS[operation]["new"]


@pytest.mark.parametrize(("operation", "what"), [("attention", "call"), ("continuation", "call"), ("decode", "decode step")])
def test_a_backend_that_was_asked_for_and_refuses_is_an_error(operation: str, what: str) -> None:
    register_backend("new", lambda: None, lambda *call: "not today", operation=operation)
    with pytest.raises(ValueError, match=f"backend='new' does not serve this {what}: not today. Use backend='auto'"):
        choose_backend(operation, "new", *call_of(operation))


@pytest.mark.parametrize("operation", ["attention", "continuation", "decode"])
def test_an_unknown_backend_is_an_error(operation: str) -> None:
    with pytest.raises(ValueError, match="backend='numpy': allowed are 'auto', 'reference', 'torch', 'triton'"):
        choose_backend(operation, "numpy", *call_of(operation))


def test_an_attention_serves_continuations_and_decode_steps_too() -> None:
    """A backend registers attention alone; all of its calls get the options as one object."""
    seen = []

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, **call: Any) -> tuple[Tensor, Memory]:
        seen.append(options)
        return chunked_attention(q, k, v, g, options, **call)

    register_backend("mine", lambda: attention)
    q, k, v, g = (x.detach() for x in random_inputs(6).tensors)
    options = AttentionOptions(2, empty_slots="weight")
    whole = nha_attention(q, k, v, g, window=2, empty_slots="weight", backend="torch")

    _, memory = nha_attention(*(x[:, :3] for x in (q, k, v, g)), window=2, empty_slots="weight", return_memory=True, backend="mine")
    slots = torch.cat([memory.slot_keys, memory.slot_values, memory.slot_log_decay[..., None]], dim=-1)
    tokens = ContinuedTokens(k[:, 1:], v[:, 1:], g[:, 1:], slots, length=3, window=2)
    continued = continue_attention(q[:, 3:], tokens, options, backend="mine")
    decoded = nha_decode_step(*(x[:, 3:] for x in (q, k, v, g)), decode_memory(memory), empty_slots="weight", backend="mine")
    assert [(given.window, given.empty_slots) for given in seen] == [(2, "weight")] * 3 and seen[1] is options
    # float64: sums over the same few tokens in another order
    torch.testing.assert_close(continued, whole[:, 3:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoded, whole[:, 3:], rtol=1e-12, atol=1e-12)


def test_a_continuation_has_the_window_of_its_memory() -> None:
    q, k, v, g = random_inputs(4).tensors
    tokens = ContinuedTokens(k, v, g, torch.zeros(1, 2, 5, 21), length=0, window=3)
    with pytest.raises(ValueError, match="a memory with window=3, the options have window=4"):
        continue_attention(q, tokens, AttentionOptions(window=4))
