"""The kernels' arithmetic in Triton's interpreter against backend="torch". Run by test_triton_interpreter.py in a process of its own,
because TRITON_INTERPRET must be set before triton is imported. Float32 only: the interpreter computes bf16 wrongly without an error."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import Memory, nha_attention
from nha_kernels.chunked import chunked_attention
from nha_kernels.triton.dispatch import choose_tiles
from nha_kernels.triton.flash import Bounds
from nha_kernels.triton.problem import Tiles


@dataclass(frozen=True)
class Case:
    window: int
    tokens: int = 20  # two chunks, the second one partly filled
    group: int = 2
    slots: int = 16
    rotary_dim: int = 64
    empty_slots: str = "attend"
    documents: tuple[int, ...] = ()
    seen: tuple[int, ...] = ()
    gate_scale: float = 1.0


CASES = {
    "window wider than a chunk": Case(window=17, tokens=22, group=1),
    "documents continue a memory": Case(window=3, group=3, rotary_dim=32, empty_slots="weight", documents=(0, 7, 7, 20), seen=(5,)),
    "rows with memories of different length": Case(window=6, tokens=18, empty_slots="mask", seen=(2, 9)),
    "slots only, gates that forget at once": Case(window=0, slots=48, rotary_dim=0, gate_scale=60.0),
}
TOLERANCE = 2e-5  # float32 sums in another order; the log-decay's gradient divides by small masses


def run(case: Case, backend: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def inputs(batch: int, tokens: int) -> dict[str, Tensor]:
        g = logsigmoid(2 * normal(batch, tokens, 1, case.slots)) * case.gate_scale
        return {"q": normal(batch, tokens, case.group, 64), "k": normal(batch, tokens, 1, 64), "v": normal(batch, tokens, 1, 64), "g": g}

    options = {
        "window": case.window,
        "rope": torch.rand(case.rotary_dim // 2, generator=generator) if case.rotary_dim else None,
        "rope_attention_factor": 1.3,
        "empty_slots": case.empty_slots,
    }
    memory, leaves = None, {}
    if case.seen:
        rows = [nha_attention(**inputs(1, seen), **options, return_memory=True, backend="torch")[1] for seen in case.seen]
        held = max(row.window_keys.shape[1] for row in rows)

        def stacked(name: str) -> Tensor:
            parts = [getattr(row, name) for row in rows]
            if name.startswith("window_"):  # rows that are not held must never be read
                parts = [torch.cat([part.new_full((1, held - part.shape[1], *part.shape[2:]), torch.nan), part], 1) for part in parts]
            return torch.cat(parts)

        tensors = {field.name: stacked(field.name) for field in fields(Memory) if field.name != "window"}
        leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
        memory = Memory(**tensors, window=case.window)
    if case.documents:
        options["cu_seqlens"] = torch.tensor(case.documents, dtype=torch.int32)
    given = {name: x.requires_grad_() for name, x in inputs(max(1, len(case.seen)), case.tokens).items()}
    out, new = nha_attention(**given, memory=memory, **options, return_memory=True, backend=backend)
    results = {"out": out, **{name: getattr(new, name) for name in ("slot_keys", "slot_values", "slot_log_decay", "window_log_gates")}}
    loss = sum((x * normal(*x.shape)).sum() for x in results.values())
    wanted = given | leaves
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        results["gradient of " + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: x.detach() for name, x in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_triton_equals_torch(name: str) -> None:
    expected, actual = run(CASES[name], "torch"), run(CASES[name], "triton")
    for part, exact in expected.items():
        error = (actual[part] - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (part, error.item())


def test_slabs_of_the_sequence_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of one chunk at a time in memory; elsewhere these sequences are a single slab."""
    from nha_kernels.triton import attention, states

    def narrow(*call: Tensor | int) -> Tiles:
        return replace(choose_tiles(*call), forward_slab=1, backward_slab=1)

    monkeypatch.setattr(states, "_LEAST_CHUNKS", 1)
    monkeypatch.setattr(attention, "choose_tiles", narrow)
    case = Case(window=3, tokens=34, empty_slots="weight", seen=(5, 9))
    expected, actual = run(case, "torch"), run(case, "triton")
    for part, exact in expected.items():
        error = (actual[part] - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (part, error.item())


def dense_logits(q: Tensor, k: Tensor, bounds: Bounds, window: int | None, scale: float) -> Tensor:
    """[HQ, B*T, B*E] with the mask of the flash kernel: causal, aligned at the ends of each sequence."""
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    k = torch.nan_to_num(k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    logits = scale * torch.einsum("thk,ehk->hte", q, k)
    visible = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    edges = zip(*(pair for x in bounds for pair in (x.tolist()[:-1], x.tolist()[1:])), strict=True)
    for first_q, last_q, first_k, last_k in edges:
        lag = (last_k - torch.arange(first_k, last_k))[None] - (last_q - torch.arange(first_q, last_q))[:, None]
        visible[first_q:last_q, first_k:last_k] = (lag >= 0) & (lag < (window or 10**9))
    return logits.masked_fill(~visible, -torch.inf)


def dense_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    logits = dense_logits(q, k, bounds, window, scale)
    values = torch.nan_to_num(v.flatten(0, 1).repeat_interleave(q.shape[2] // v.shape[2], dim=1))
    out = torch.einsum("hte,ehv->thv", logits.softmax(-1), values)
    return out.view(*q.shape[:3], -1), logits.logsumexp(-1).t().reshape(q.shape[:3])  # strided, as PyTorch's kernel leaves it


def dense_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Bounds, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the flash kernel computes from the out and lse it is given, which here are those of slots and window together."""
    group = q.shape[2] // k.shape[2]
    keys, values = (torch.nan_to_num(x.flatten(0, 1).repeat_interleave(group, dim=1)) for x in (k, v))
    p = torch.exp(dense_logits(q, k, bounds, window, scale) - lse.flatten(0, 1).t()[..., None])
    flat = d_out.flatten(0, 1)
    offset = (flat * out.flatten(0, 1)).sum(-1).t()[..., None]
    d_logits = scale * p * (torch.einsum("thv,ehv->hte", flat, values) - offset)
    dk = torch.einsum("hte,thk->ehk", d_logits, q.flatten(0, 1)).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hte,thv->ehv", p, flat).unflatten(1, (-1, group)).sum(2)
    return torch.einsum("hte,ehk->thk", d_logits, keys).view(q.shape), dk.view(k.shape), dv.view(v.shape)


WIDE_CASES = {
    "documents continue a memory": Case(window=5, empty_slots="weight", documents=(0, 8, 8, 20), seen=(7,)),
    "rows with memories of different length": Case(window=5, tokens=17, empty_slots="attend", seen=(2, 9)),
}


@pytest.mark.parametrize("name", WIDE_CASES)
def test_window_by_another_kernel_equals_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide windows with a dense stand-in for PyTorch's flash kernel, which has no CPU form with a window."""
    from nha_kernels.triton import attention, merged_attention

    monkeypatch.setattr(attention, "WIDEST_FUSED_WINDOW", 4)
    monkeypatch.setattr(merged_attention, "flash_forward", dense_forward)
    monkeypatch.setattr(merged_attention, "flash_backward", dense_backward)
    expected, actual = run(WIDE_CASES[name], "torch"), run(WIDE_CASES[name], "triton")
    for part, exact in expected.items():
        error = (actual[part] - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (part, error.item())


@pytest.mark.parametrize("empty_slots", ["attend", "mask"])
def test_full_attention_by_another_library_equals_torch(empty_slots: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`full` layers with a dense stand-in for cuDNN. Dispatch refuses float32 there, so the backend's function is called itself."""
    from nha_kernels.triton import attention, merged_attention
    from nha_kernels.triton.flash import sequence_bounds

    def bounds_of(q: Tensor) -> Bounds:
        return sequence_bounds(q.shape[0], q.shape[1], 0, torch.zeros(q.shape[0], dtype=torch.int64), None)

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        return *dense_forward(q, k, v, bounds_of(q), None, scale), [None, None]

    def backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _: list, scale: float) -> tuple[Tensor, ...]:
        return dense_backward(d_out, q, k, v, out, lse, bounds_of(q), None, scale)

    monkeypatch.setattr(merged_attention, "full_attention_kernel", lambda *_, one_document: "cudnn" if one_document else "flash")
    monkeypatch.setattr(merged_attention, "cudnn_forward", forward)
    monkeypatch.setattr(merged_attention, "cudnn_backward", backward)
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(2, 9, heads, dim, generator=generator) for heads, dim in ((4, 64), (2, 64), (2, 64), (2, 16))]
    inputs[3] = logsigmoid(inputs[3])
    options = {"rope": torch.rand(32, generator=generator), "rope_attention_factor": 1.3, "empty_slots": empty_slots}
    more = {"window": None, "scale": 0.1, "cu_seqlens": None, "memory": None}
    results = []
    for function in (attention.triton_attention, chunked_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, _ = function(*leaves, **options, **more)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves[:3])])
    for given, exact in zip(*results, strict=True):
        assert (given - exact).norm() <= TOLERANCE * exact.norm()
