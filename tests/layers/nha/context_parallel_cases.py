"""Shard layouts for property tests, and one random sequence cut over ranks and compared with one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nha_kernels import AttentionOptions, nha_attention
from nha_megatron.layers.nha.context_parallel.exchange import context_parallel_attention


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, ...] | None]:
    """(L, R, W, cu_seqlens) with windows from 0 to beyond the sequence and boundaries favouring shard edges and their neighbours."""
    shard, num_ranks = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    total = shard * num_ranks
    window = draw(st.one_of(st.integers(0, shard + 1), st.integers(0, total + 2)))
    if draw(st.booleans()):
        return shard, num_ranks, window, None
    near_edges = (r * shard + offset for r in range(num_ranks + 1) for offset in (-window, -1, 0, 1))
    edges = [edge for edge in near_edges if 0 <= edge <= total]
    boundaries = draw(st.lists(st.one_of(st.sampled_from(edges), st.integers(0, total)), max_size=6))
    return shard, num_ranks, window, (0, *sorted(boundaries))


@dataclass(frozen=True)
class Case:
    """One sequence of `tokens` tokens on `num_ranks` ranks. K = 12 (8 of them rotary when `rope` is "partial") and V = 8."""

    num_ranks: int
    tokens: int
    window: int | None  # None: full attention
    batch: int = 1
    kv_heads: int = 2
    group_size: int = 1
    slots: int = 3
    empty_slots: str = "attend"
    rope: str | None = "full"
    rope_attention_factor: float = 1.0
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    gates: str = "spread"
    cu_seqlens: tuple[int, ...] | None = None
    loss_from: int = 0  # the loss counts tokens from here on
    changed: tuple[int, int] | None = None  # these tokens are drawn anew, all others stay as they are
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        rotary_pairs = {None: 0, "partial": 4, "full": 6}[self.rope]
        frequencies = 100.0 ** -(torch.arange(rotary_pairs, dtype=torch.float64) / max(rotary_pairs, 1))
        return {
            "window": self.window,
            "empty_slots": self.empty_slots,
            "rope": frequencies if self.rope else None,
            "rope_attention_factor": self.rope_attention_factor,
            "scale": self.scale,
        }

    def sequence(self) -> tuple[list[Tensor], Tensor]:
        """q, k, v, g of the whole sequence, and the gradient of the loss in the output."""
        inputs, d_out = self._draw(self.seed)
        if self.changed is not None:
            other, _ = self._draw(self.seed + 1000)
            for tensor, replacement in zip(inputs, other, strict=True):
                tensor[:, slice(*self.changed)] = replacement[:, slice(*self.changed)]
        d_out[:, : self.loss_from] = 0
        return inputs, d_out

    def _draw(self, seed: int) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int, channels: int) -> Tensor:
            return torch.randn(self.batch, self.tokens, heads, channels, generator=generator, dtype=torch.float64)

        heads = self.kv_heads * self.group_size
        q, k, v = normal(heads, 12), normal(self.kv_heads, 12), normal(self.kv_heads, 8)
        z, d_out = normal(self.kv_heads, self.slots), normal(heads, 8)
        if self.gates == "spread":
            g = F.logsigmoid(4 * z) / 8
        else:  # open (g = 0 to rounding), closed (-25), and below the clamp at -40
            g = torch.where(z.abs() > 1.5, -1e4, F.logsigmoid(200 * z.sign()) / 8)
        gate_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), g.to(gate_dtype)], d_out.to(self.dtype)


Results = dict[str, Tensor]  # out, dq, dk, dv, dg over all tokens


def on_one_rank(case: Case, backend: str = "reference", dtype: torch.dtype | None = None, row: int | None = None) -> Results:
    """The single-device operator on the concatenated sequence.

    `dtype` computes on the same (rounded) inputs in another precision, `row` takes one row of the batch alone.
    """
    inputs, d_out = case.sequence()
    if row is not None:
        inputs, d_out = [x[row : row + 1] for x in inputs], d_out[row : row + 1]
    if dtype is not None:
        inputs, d_out = [x.to(dtype) for x in inputs], d_out.to(dtype)
    inputs = [x.requires_grad_() for x in inputs]
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    out = nha_attention(*inputs, cu_seqlens=cu_seqlens, backend=backend, **case.options)
    return results_of(out, torch.autograd.grad(out, inputs, d_out))


def on_this_rank(cases: list[Case], operator: str) -> list[Results]:
    """Runs on every rank of the pool: this rank's shard of every case."""
    group, results = dist.group.WORLD, []
    assert group is not None
    for case in cases:
        inputs, d_out = case.sequence()
        inputs = [x.chunk(group.size(), dim=1)[group.rank()].contiguous().requires_grad_() for x in inputs]
        options = AttentionOptions(**case.options)
        out = context_parallel_attention(*inputs, options, group=group, cu_seqlens=case.cu_seqlens, backend=operator)
        results.append(results_of(out, torch.autograd.grad(out, inputs, d_out.chunk(group.size(), dim=1)[group.rank()])))
    return results


def results_of(out: Tensor, gradients: tuple[Tensor, ...]) -> Results:
    return dict(zip(("out", "dq", "dk", "dv", "dg"), (out.detach(), *gradients), strict=True))


def join_shards(shards: list[Results]) -> Results:
    return {name: torch.cat([shard[name] for shard in shards], dim=1) for name in shards[0]}


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """Ratio of norms; of the difference alone where what is wanted is zero."""
    difference, norm = (given.double() - wanted.double()).norm(), wanted.double().norm()
    return float(difference / norm if norm > 0 else difference)


def assert_close(given: Results, wanted: Results, tolerance: float, of: Any) -> None:
    errors = {name: relative_error(given[name], wanted[name]) for name in wanted}
    assert all(error <= tolerance for error in errors.values()), f"{of}: relative errors {errors}, allowed {tolerance}"
