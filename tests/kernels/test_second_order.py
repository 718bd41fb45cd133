"""Derivatives of derivatives: right in PyTorch, an error where a function of ours has first ones only; never silently wrong."""

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import nha_kernels.slot_attention
from nha_kernels import nha_attention
from tests.kernels.operator_cases import ROPE, boundaries, random_inputs, relative_error

ROOT = Path(__file__).parents[2]

# Their backward consists of differentiable operations.
DIFFERENTIABLE = {"_WindowAttention", "_KeepInGraph", "_SwiGLU"}


def second_derivatives(backend: str, **options: Any) -> list[Tensor]:
    """Gradients of a gradient penalty over output and memory."""
    inputs = random_inputs(21).tensors
    out, memory = nha_attention(*inputs, backend=backend, return_memory=True, **options)
    value = out.sum() + out.square().sum() + memory.slot_keys.square().sum()  # `sum` sends a constant into the backward
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    found = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 4, "rope": ROPE},
        {"window": 0},
        {"window": None},
        {"window": 4, "empty_slots": "mask", "cu_seqlens": boundaries(0, 3, 3, 14, 21)},
        {"window": 4, "empty_slots": "weight", "cu_seqlens": boundaries(0, 3, 3, 14, 21), "rope": ROPE},
    ],
    ids=str,
)
@pytest.mark.parametrize("recomputed", [False, True])
def test_plain_pytorch_equals_the_reference(options: dict[str, Any], recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if recomputed:  # as long sequences are: chunk by chunk, under checkpoints
        monkeypatch.setattr(nha_kernels.slot_attention, "_ELEMENTS_PER_GROUP", 1)
    for given, wanted in zip(second_derivatives("torch", **options), second_derivatives("reference", **options), strict=True):
        assert relative_error(given, wanted) < 1e-12


def test_hessian_of_the_operator() -> None:
    q, k, v, g = (x.detach() for x in random_inputs(4, heads=1, kv_heads=1, slots=2).tensors)
    norms = [
        torch.autograd.functional.hessian(lambda q, backend=backend: nha_attention(q, k, v, g, window=2, backend=backend).sum(), q).norm()
        for backend in ("torch", "reference")
    ]
    torch.testing.assert_close(*norms)


def functions() -> list[Any]:
    """(module, class) of every autograd function of ours."""
    found = []
    for top, folder in (("nha_kernels", ROOT / "kernels" / "nha_kernels"), ("nha_megatron", ROOT / "nha_megatron")):
        for path in sorted(folder.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert "import once_differentiable" not in text, f"{path}: use first_order_only, which says why"
            module = ".".join((top, *path.relative_to(folder).with_suffix("").parts))
            found += [pytest.param(module, name, id=name) for name in re.findall(r"(?m)^class (\w+)\((?:\w+\.)*Function\)", text)]
    return found


@pytest.mark.parametrize(("module", "name"), functions())
def test_every_function_is_differentiable_twice_or_says_that_it_is_not(module: str, name: str) -> None:
    if name in DIFFERENTIABLE:
        return
    if ".triton." in module:
        pytest.importorskip("triton")
    function = getattr(import_module(module), name)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"first derivatives only.*create_graph"):  # as create_graph=True runs it
        function.backward(SimpleNamespace(), None, None, None, None, None)
