"""Wide and full windows in Triton's interpreter against backend="torch", with a dense stand-in for the libraries, none of which runs on
the CPU. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import AttentionOptions, Memory
from nha_kernels.chunked import chunked_attention
from nha_kernels.rope import rope_tables, rotate
from nha_kernels.triton.attention import backend, beside_library
from nha_kernels.triton.attention.rotary import rotated_heads
from nha_kernels.triton.libraries import choice as libraries
from nha_kernels.triton.libraries.adapter import Bounds, WindowOutput
from nha_kernels.triton.libraries.torch_flash import _rows_of_the_batch
from tests.kernels.triton.libraries.stand_ins import cute_interface, dense_attention, dense_gradients, flash_attn_interface

TOLERANCE = 2e-5  # float32 sums in another order; the log-decay's gradient divides by small masses


def dense_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, window: int | None, scale: float) -> WindowOutput:
    out, lse = dense_attention(*(x.flatten(0, 1) for x in (q, k, v)), *(bounds or _rows_of_the_batch(q)), window, scale)
    return WindowOutput(out.view(*q.shape[:3], -1), lse.t().contiguous().view(q.shape[:3]))


def dense_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, result: WindowOutput, bounds: Bounds | None, window: int | None, scale: float
) -> tuple[Tensor, ...]:
    flat = [x.flatten(0, 1) for x in (d_out, q, k, v, result.out)]
    gradients = dense_gradients(*flat, result.lse.flatten(0, 1).t(), *(bounds or _rows_of_the_batch(q)), window, scale)
    return tuple(d.view(x.shape) for d, x in zip(gradients, (q, k, v), strict=True))


@pytest.fixture(autouse=True)
def dense_library(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(forward=dense_forward, backward=dense_backward)
    monkeypatch.setattr(beside_library, "load_library", lambda name: {"torch-flash": stand_in}[name])


def inputs(batch: int, tokens: int, *, kv_heads: int = 1, group: int = 2, seed: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, generator=generator)

    return [normal(kv_heads * group, 64), normal(kv_heads, 64), normal(kv_heads, 64), logsigmoid(normal(kv_heads, 16))]


def compare(given: list[Tensor], memory: Memory | None, cu_seqlens: Tensor | None = None, **changed: object) -> None:
    """Output, memory and all gradients of both. Dispatch refuses float32 for libraries, so the backend's function is called itself."""
    generator = torch.Generator().manual_seed(9)
    options = AttentionOptions(rope=torch.rand(24, generator=generator), rope_attention_factor=1.3, scale=0.1, **changed)
    results: list[list[Tensor]] = []
    for function in (backend.triton_attention, chunked_attention):
        leaves = [x.clone().requires_grad_() for x in given]
        own = None if memory is None else memory.map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
        out, after = function(*leaves, options, cu_seqlens=cu_seqlens, memory=own)
        outputs = [out, after.slot_keys, after.slot_values, after.slot_log_decay, after.window_keys]
        weights = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=weights)).sum() for x in outputs)
        if own is not None:
            leaves += [own.slot_keys, own.slot_values, own.slot_log_decay, own.window_keys, own.window_values, own.window_log_gates]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([*outputs, *(torch.zeros_like(x) if d is None else d for d, x in zip(gradients, leaves, strict=True))])
        assert torch.equal(after.length, results[0][0].new_tensor(after.length.tolist()).long())
    for index, (mine, exact) in enumerate(zip(*results, strict=True)):
        error = (mine - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (index, error.item())


def memory_of(lengths: list[int], window: int | None, *, kv_heads: int = 1, slots_hold: bool = True) -> Memory:
    """Rows of different length; window rows that hold nothing are NaN: they must never be read."""
    generator = torch.Generator().manual_seed(7)
    batch, held = len(lengths), max(lengths) if window is None else min(max(lengths), window)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(batch, *shape, generator=generator)
        return x if slots_hold or shape[0] == held else torch.zeros_like(x)

    rows = [normal(held, kv_heads, 64), normal(held, kv_heads, 64), logsigmoid(normal(held, kv_heads, 16))]
    for row, length in enumerate(lengths):
        for x in rows:
            x[row, : max(0, held - length)] = torch.nan
    decay = logsigmoid(normal(kv_heads, 16)) if slots_hold else normal(kv_heads, 16)
    return Memory(normal(kv_heads, 16, 64), normal(kv_heads, 16, 64), decay, *rows, torch.tensor(lengths), window)


def test_wide_window_over_documents_that_continue_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "attends_by_library", lambda q, v, window: True)
    documents = torch.tensor([0, 8, 8, 20], dtype=torch.int32)
    compare(inputs(1, 20), memory_of([7], 5), window=5, cu_seqlens=documents, empty_slots="weight")


def test_wide_window_over_rows_of_different_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "attends_by_library", lambda q, v, window: True)
    compare(inputs(2, 6), memory_of([2, 9], 5), window=5, empty_slots="attend")


@pytest.mark.parametrize("empty_slots", ["attend", "mask"])
def test_full_window(empty_slots: str) -> None:
    compare(inputs(2, 9, kv_heads=2), None, window=None, empty_slots=empty_slots)


def test_full_window_over_documents() -> None:
    compare(inputs(1, 9), None, window=None, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32), empty_slots="attend")


def test_full_window_over_rows_of_different_length() -> None:
    """Also over memories whose slots hold something, which no call with a full window leaves behind."""
    compare(inputs(2, 9), memory_of([7, 3], None), window=None, empty_slots="weight")


def test_full_window_continues_what_a_full_window_left() -> None:
    documents = torch.tensor([0, 3, 5], dtype=torch.int32)
    compare(inputs(1, 5), memory_of([7], None, slots_hold=False), window=None, cu_seqlens=documents, empty_slots="mask")


def test_cudnn_attends_where_one_document_fills_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call reaches the library without bounds, so that a kernel without documents may serve it."""
    seen: list[Bounds | None] = []

    def forward(*call: object) -> WindowOutput:
        seen.append(call[3])
        return dense_forward(*call)

    stand_in = SimpleNamespace(forward=forward, backward=dense_backward)
    monkeypatch.setattr(beside_library, "load_library", lambda name: {"cudnn": stand_in}[name])
    monkeypatch.setattr(backend, "choose_library", lambda call: libraries.Choice("cudnn" if call.one_document else "other", ""))
    compare(inputs(2, 9), None, window=None, empty_slots="attend")
    assert seen == [None]


def test_groups_larger_than_a_tile_run_in_parts() -> None:
    """5 query heads to a KV head: float32 tiles take 4, so 3 + 2."""
    compare(inputs(1, 2, group=5), memory_of([3], 1), window=1, empty_slots="weight")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bounds", [None, Bounds(torch.tensor([0, 0, 2, 2, 5, 8]).int(), torch.tensor([0, 1, 4, 4, 7, 12]).int())])
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4"])
def test_adapters_of_the_packages(name: str, bounds: Bounds | None, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sequences that have no queries, no rows, and more rows than queries; the backward from out and lse of a softmax over more."""
    package = ModuleType("flash_attn")
    package.flash_attn_interface, package.cute = flash_attn_interface(), cute_interface()
    modules = {"flash_attn": package, "flash_attn.flash_attn_interface": package.flash_attn_interface}
    modules |= {"flash_attn.cute": package.cute, "flash_attn.cute.interface": package.cute.interface}
    for path, module in modules.items():
        monkeypatch.setitem(sys.modules, path, module)
    for adapter in ("flash_attn_2", "flash_attn_4"):
        monkeypatch.delitem(sys.modules, f"nha_kernels.triton.libraries.{adapter}", raising=False)
    library = libraries.load_library(name)

    generator = torch.Generator().manual_seed(3)
    rows = 4 if bounds is None else 6
    q, k, v, d_out = (torch.randn(2, *shape, 8, generator=generator) for shape in ((4, 6), (rows, 2), (rows, 2), (4, 6)))
    given, exact = (f(q, k, v, bounds, window, 0.3) for f in (library.forward, dense_forward))
    larger = WindowOutput(0.9 * exact.out, exact.lse + torch.rand(exact.lse.shape, generator=generator), given.random_state)
    results = [[*r[:2], *f(d_out, q, k, v, larger, bounds, window, 0.3)] for r, f in ((given, library.backward), (exact, dense_backward))]
    assert given.out.is_contiguous() and given.lse.is_contiguous()
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)  # the same arithmetic behind other arguments


@pytest.mark.parametrize("pairs", [1, 24, 32])
def test_rotation_equals_plain_pytorch(pairs: int) -> None:
    """At positions where a float32 angle would be off by hundredths of a radian."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 3, 64, generator=generator, requires_grad=True)
    frequencies = torch.rand(pairs, generator=generator, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [10**6, 10**6 + 1, 0, 1, 7]])

    def exact(positions: Tensor) -> Tensor:
        return torch.stack([rotate(row, *rope_tables(at, frequencies, 1.2, torch.float32)) for row, at in zip(x, positions, strict=True)])

    cases: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: rotated_heads(x, positions, frequencies, 1.2), positions),
        (lambda: rotated_heads(x, positions[1:], frequencies, 1.2), positions[1:].expand(2, -1)),
        (lambda: rotated_heads(x, None, frequencies, 1.2, first_position=3), torch.arange(3, 8).expand(2, -1)),
    ]
    weight = torch.randn(x.shape, generator=generator)
    for rotation, at in cases:
        given, wanted = rotation(), exact(at)
        torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)  # two products and a sum in float32
        torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (given, wanted)), rtol=1e-6, atol=1e-6)
