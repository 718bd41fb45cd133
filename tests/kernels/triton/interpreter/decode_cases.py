"""The fused decode step in Triton's interpreter against backend="reference" in float64. Run by test_interpreter.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import DecodeMemory, Memory, decode_memory, explain_decode_dispatch, nha_attention, nha_decode_step


@dataclasses.dataclass(frozen=True)
class Case:
    window: int
    seen: tuple[int, ...]  # tokens before the first step, for each row of the batch
    steps: tuple[int, ...]  # tokens of each step
    group: int = 2
    kv_heads: int = 1
    key_dim: int = 64
    value_dim: int = 64
    slots: int = 16
    rotary_dim: int = 64
    empty_slots: str = "attend"
    gate_scale: float = 1.0


CASES = {
    "the ring turns more than once": Case(window=5, seen=(3, 12), steps=(1, 3, 1, 2), empty_slots="weight"),
    "steps longer than the window": Case(window=3, seen=(0, 2, 9), steps=(8, 1, 5), group=3, kv_heads=2, rotary_dim=32, empty_slots="mask"),
    "slots only": Case(window=0, seen=(0, 4), steps=(1, 2), slots=48, rotary_dim=0, gate_scale=60.0),
    "a window of several pieces": Case(window=70, seen=(80, 20), steps=(2, 1), value_dim=128, slots=32, empty_slots="mask"),
    "the first token of a sequence": Case(window=4, seen=(0,), steps=(1,), empty_slots="weight"),
    "64 rows": Case(window=6, seen=(7,), steps=(8,), group=8),
}
TOLERANCE = 1e-5  # float32 against float64


def random_tokens(case: Case, batch: int, count: int, generator: torch.Generator) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=generator)

    g = logsigmoid(2 * normal(case.kv_heads, case.slots)) * case.gate_scale
    return [
        normal(case.kv_heads * case.group, case.key_dim),
        normal(case.kv_heads, case.key_dim),
        normal(case.kv_heads, case.value_dim),
        g,
    ]


def memory_of_rows(case: Case, options: dict, generator: torch.Generator) -> DecodeMemory:
    """Rows of different length in one batch; window rows that hold nothing are NaN, so that reading one shows."""
    rows = []
    for seen in case.seen:
        tokens = random_tokens(case, 1, seen, generator)
        row = decode_memory(nha_attention(*tokens, **options, return_memory=True, backend="torch")[1])
        for name in ("window_keys", "window_values", "window_log_gates"):
            getattr(row, name)[:, : max(0, case.window - seen)] = torch.nan
        rows.append(row)
    names = [field.name for field in dataclasses.fields(DecodeMemory) if field.name != "window"]
    return DecodeMemory(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names}, window=case.window)


@pytest.mark.parametrize("name", CASES)
def test_fused_steps_equal_the_reference(name: str) -> None:
    case = CASES[name]
    generator = torch.Generator().manual_seed(5)
    options = {
        "rope": torch.rand(case.rotary_dim // 2, generator=generator) if case.rotary_dim else None,
        "rope_attention_factor": 1.3,
        "empty_slots": case.empty_slots,
    }
    memory = memory_of_rows(case, {**options, "window": case.window}, generator)
    exact: Memory = memory.aligned().map(lambda x: x.double() if x.is_floating_point() else x.clone())
    for count in case.steps:
        tokens = random_tokens(case, len(case.seen), count, generator)
        assert explain_decode_dispatch(*tokens, memory).startswith("triton")
        out = nha_decode_step(*tokens, memory, **options, backend="triton")
        wanted, exact = nha_attention(
            *(x.double() for x in tokens), window=case.window, memory=exact, **options, return_memory=True, backend="reference"
        )
        assert (out - wanted).norm() <= TOLERANCE * wanted.norm()
    assert torch.equal(memory.length, exact.length)
    turned = memory.aligned()
    for field in ("slot_keys", "slot_values", "slot_log_decay", "window_keys", "window_values", "window_log_gates"):
        given, wanted = getattr(turned, field), getattr(exact, field)
        if field.startswith("window_"):  # the reference returns no more rows than the longest sequence needs
            given = given[:, case.window - wanted.shape[1] :]
            held = torch.arange(wanted.shape[1]) >= wanted.shape[1] - exact.length[:, None]
            given, wanted = given[held], wanted[held]
        assert (given - wanted).norm() <= TOLERANCE * wanted.norm(), field
