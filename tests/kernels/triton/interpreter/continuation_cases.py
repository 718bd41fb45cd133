"""Tokens behind their memory in one buffer: the fused kernels in Triton's interpreter against memory and tokens apart in plain PyTorch.
Run by test_interpreter.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import AttentionOptions, ContinuedTokens, continue_attention


@dataclass(frozen=True)
class Case:
    window: int
    length: int
    tokens: int = 20
    batch: int = 1
    empty_slots: str = "attend"
    documents: tuple[int, ...] = ()


CASES = {
    "all of the window": Case(window=3, length=40, batch=2),
    "a start shorter than the window": Case(window=6, length=2, empty_slots="mask"),
    "nothing before": Case(window=5, length=0, empty_slots="weight"),
    "no window": Case(window=0, length=9, empty_slots="weight"),
    "documents": Case(window=4, length=30, empty_slots="mask", documents=(0, 7, 9, 20)),
    "no token of the memory's document": Case(window=4, length=30, documents=(0, 0, 9, 20)),
}
TOLERANCE = 2e-5  # as for the operator: float32 sums in another order; the log-decay's gradient divides by small masses


def run(case: Case, backend: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, generator=generator)

    rows = min(case.window, case.length) + case.tokens
    log_gates = logsigmoid(2 * normal(rows, 1, 16))
    log_gates[:, ::5, :, ::4] -= 50  # below the clamp, also among the memory's rows: no gradient
    slots = torch.cat([normal(1, 16, 128), -normal(1, 16, 1).abs()], dim=-1)
    if case.length <= case.window:
        slots.zero_()
    leaves = {"q": normal(case.tokens, 2, 64), "keys": normal(rows, 1, 64), "values": normal(rows, 1, 64)}
    leaves = {name: x.requires_grad_() for name, x in (leaves | {"log_gates": log_gates, "slots": slots}).items()}
    tokens = ContinuedTokens(*(leaves[name] for name in ("keys", "values", "log_gates", "slots")), length=case.length, window=case.window)
    out = continue_attention(
        leaves["q"],
        tokens,
        AttentionOptions(case.window, torch.rand(32, generator=generator), empty_slots=case.empty_slots),
        cu_seqlens=torch.tensor(case.documents, dtype=torch.int32) if case.documents else None,
        backend=backend,
    )
    gradients = torch.autograd.grad((out * normal(*out.shape[1:])).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("name", CASES)
def test_fused_equals_apart(name: str) -> None:
    expected, actual = run(CASES[name], "torch"), run(CASES[name], "triton")
    for part, exact in expected.items():
        error = (actual[part] - exact).norm() / exact.norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (part, error.item())
