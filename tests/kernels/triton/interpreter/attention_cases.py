"""The kernels' arithmetic in Triton's interpreter against backend="torch". Run by test_interpreter.py in a process of its own,
because TRITON_INTERPRET must be set before triton is imported. Float32 only: the interpreter computes bf16 wrongly without an error."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import Memory, nha_attention
from nha_kernels.triton.architectures.tiles import Tiles
from nha_kernels.triton.dispatch import choose_tiles


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
    compare(CASES[name])


def compare(case: Case) -> None:
    expected, actual = run(case, "torch"), run(case, "triton")
    for part, exact in expected.items():
        error = (actual[part] - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (part, error.item())


def test_slabs_of_the_sequence_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of one chunk at a time in memory; elsewhere these sequences are a single slab."""
    from nha_kernels.triton.attention import fused, states

    def narrow(*call: Tensor | int) -> Tiles:
        return replace(choose_tiles(*call), forward_slab=1, backward_slab=1)

    monkeypatch.setattr(states, "_LEAST_CHUNKS", 1)
    monkeypatch.setattr(fused, "choose_tiles", narrow)
    compare(Case(window=3, tokens=34, empty_slots="weight", seen=(5, 9)))


def test_slots_alone_sum_delta_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 16-bit inputs do: here the inputs are float32, which take it from the output."""
    from nha_kernels.triton.attention.problem import Problem

    monkeypatch.setattr(Problem, "sums_delta_over_slots", True)
    compare(Case(window=0, slots=32, documents=(0, 7, 20), seen=(5,), gate_scale=60.0))


def test_a_window_wider_than_the_sequence_costs_no_more_than_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    from nha_kernels.triton.attention import fused

    lengths = []
    table = fused.rope_table
    monkeypatch.setattr(fused, "rope_table", lambda *call: lengths.append(call[2]) or table(*call))
    compare(Case(window=10**9, empty_slots="weight", seen=(15,)))
    assert lengths and max(lengths) < 20 + 15 + 200


def test_the_windows_gradients_take_other_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens a program of queries, fewer beside a block of keys, than a chunk holds."""
    from nha_kernels.triton.attention import fused

    monkeypatch.setattr(fused, "choose_tiles", lambda *call: replace(choose_tiles(*call), query_chunk=32, key_chunk=8))
    compare(Case(window=18, tokens=37, group=1, documents=(0, 7, 37), seen=(5,)))
