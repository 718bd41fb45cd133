"""Full attention over ranks on the sequences of `context_parallel_cases`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nha_kernels import AttentionOptions
from nha_megatron.layers.nha.full.over_ranks import full_attention_over_ranks, full_attention_statistics
from tests.layers.nha.context_parallel_cases import Case, Results, results_of


def full_on_this_rank(cases: list[Case], exchange: str, operator: str = "torch") -> list[Results]:
    """Runs on every rank of the pool: this rank's shard of every case."""
    results = []
    for case in cases:
        group, inputs, d_out, options = shard_of(case)
        inputs = [x.requires_grad_() for x in inputs]
        out = full_attention_over_ranks(*inputs, options, group=group, exchange=exchange, cu_seqlens=case.cu_seqlens, backend=operator)
        results.append(results_of(out, torch.autograd.grad(out, inputs, d_out)))
    return results


def full_statistics_of_this_rank(case: Case, exchange: str) -> dict[str, torch.Tensor]:
    group, inputs, _, options = shard_of(case)
    return full_attention_statistics(*inputs, options, group=group, exchange=exchange, cu_seqlens=case.cu_seqlens)


def shard_of(case: Case) -> tuple[dist.ProcessGroup, list[torch.Tensor], torch.Tensor, AttentionOptions]:
    group = dist.group.WORLD
    assert group is not None and case.window is None
    inputs, d_out = (
        [x.chunk(group.size(), dim=1)[group.rank()].contiguous() for x in of] for of in (case.sequence()[0], case.sequence()[1:])
    )
    return group, inputs, d_out[0], AttentionOptions(**case.options)
