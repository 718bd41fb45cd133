"""The kernels of slot_summary in Triton's interpreter against plain PyTorch in float64. Run by test_triton_interpreter.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import slot_summary
from nha_kernels.slot_summary import summary_in_pytorch


@dataclass(frozen=True)
class Case:
    tokens: int
    batch: int = 1
    heads: int = 1
    value_dim: int = 64
    slots: int = 16
    gate_scale: float = 1.0
    least_chunks: int = 8


CASES = {
    "one chunk, partly filled": Case(tokens=7),
    "several chunks and rows": Case(tokens=70, batch=2, heads=2),
    "segments that end unevenly": Case(tokens=165, value_dim=128, slots=48, least_chunks=2),
    "gates that forget at once": Case(tokens=66, gate_scale=60.0, least_chunks=1),
}
TOLERANCE = 1e-6  # float32 sums of at most 165 terms of one size against float64


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nha_kernels.triton import summary

    case = CASES[name]
    monkeypatch.setattr(summary, "_LEAST_CHUNKS", case.least_chunks)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    longer = [normal(case.batch, case.tokens + 5, case.heads, dim) for dim in (64, case.value_dim, case.slots)]
    longer[2] = logsigmoid(2 * longer[2]) * case.gate_scale
    inputs = [x[:, 3:-2] for x in longer]  # a piece of a shard: rows of the batch are not adjacent
    results = []
    for function, dtype in ((slot_summary, torch.float32), (summary_in_pytorch, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, x in enumerate(outputs)]
        gradients = torch.autograd.grad(sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True)), leaves)
        results.append([*outputs, *gradients])
    assert results[0][0].grad_fn is not None and "Summary" in results[0][0].grad_fn.name()  # the kernels ran
    for given, exact in zip(*results, strict=True):
        assert (given - exact).norm() <= TOLERANCE * exact.norm()
