"""The kernels of slot_summary in Triton's interpreter against plain PyTorch in float64. Run by test_interpreter.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nha_kernels import slot_summary
from nha_kernels.slot_summary import add_summary_gradients, summarise_slots, summary_in_pytorch
from nha_kernels.triton.dispatch import refusal_of_summary


@dataclass(frozen=True)
class Case:
    tokens: int
    batch: int = 1
    heads: int = 1
    value_dim: int = 64
    slots: int = 16
    gate_scale: float = 1.0
    least_chunks: int = 8
    most_segments: int = 64


CASES = {
    "one chunk, partly filled": Case(tokens=7),
    "several chunks and rows": Case(tokens=70, batch=2, heads=2),
    "segments that end unevenly": Case(tokens=165, value_dim=128, slots=48, least_chunks=2),
    "short segments at the end, long ones before": Case(tokens=330, least_chunks=1, most_segments=4),
    "gates that forget at once": Case(tokens=66, gate_scale=60.0, least_chunks=1),
}
TOLERANCE = 1e-6  # float32 sums of at most 165 terms of one size against float64


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nha_kernels.triton.summary import backward, forward

    case = CASES[name]
    monkeypatch.setattr(forward, "_LEAST_CHUNKS", case.least_chunks)
    monkeypatch.setattr(forward, "_MOST_SEGMENTS", case.most_segments)
    monkeypatch.setattr(backward, "_CHUNKS_AT_ONCE", 4)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    longer = [normal(case.batch, case.tokens + 5, case.heads, dim) for dim in (64, case.value_dim, case.slots)]
    longer[2] = logsigmoid(2 * longer[2]) * case.gate_scale
    longer[0] = torch.cat([longer[0], longer[0]], dim=-1)[..., :64]  # part of a projection: heads are apart
    inputs = [x[:, 3:-2] for x in longer]  # a piece of a shard: rows of the batch are not adjacent
    results = []
    for function, dtype in ((slot_summary, torch.float32), (summary_in_pytorch, torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, x in enumerate(outputs)]
        gradients = torch.autograd.grad(sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True)), leaves)
        results.append([*outputs, *gradients])
    assert refusal_of_summary(*inputs) is None  # the kernels ran
    for given, exact in zip(*results, strict=True):
        assert (given - exact).norm() <= TOLERANCE * exact.norm()


@pytest.mark.parametrize("d_log_decay", [0.0, 0.5])
def test_what_has_decayed_to_nothing_is_not_read_and_has_no_gradient(d_log_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long past before 32 tokens with log-gates of -4, behind which float32 weights are zero. The log-decay counts all tokens."""
    from nha_kernels.triton.summary import forward

    monkeypatch.setattr(forward, "_LEAST_CHUNKS", 1)
    monkeypatch.setattr(forward, "_MOST_SEGMENTS", 4)
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(1, 320, 2, 64, generator=generator) for _ in range(2))
    g = -torch.rand(1, 320, 2, 16, generator=generator)
    g[:, -32:] = -4.0
    lost = slice(0, 256)
    summaries, gradients = [], []
    for hidden in (False, True):
        inputs = [k.clone(), v.clone(), g]
        if hidden and d_log_decay == 0:
            inputs[0][:, lost] = inputs[1][:, lost] = torch.nan
        summary_ = torch.empty(1, 2, 16, 129)
        kept = summarise_slots(*inputs, summary_)
        given = [torch.ones_like(x) for x in inputs]
        d_summary = torch.randn(summary_.shape, generator=torch.Generator().manual_seed(5))
        d_summary[..., -1] = d_log_decay
        add_summary_gradients(*inputs, kept, d_summary, *given)
        summaries.append(summary_)
        gradients.append(given)
    assert torch.equal(*summaries) and summaries[0][..., -1].max() < -128 - 100
    dk, dv, dg = gradients[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert dk[:, lost].eq(1).all() and dv[:, lost].eq(1).all() and dk[:, 288:].ne(1).any()  # added to the ones that were there
    torch.testing.assert_close(dg[:, lost], torch.full_like(dg[:, lost], 1 + d_log_decay))
