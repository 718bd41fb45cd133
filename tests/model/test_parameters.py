"""Slices of parameters over tensor-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nha_megatron.model.parameters import full_from_shards, full_shape, shard_of


def parameter(shape: tuple[int, ...], dim: int | None, stride: int = 1) -> nn.Parameter:
    made = nn.Parameter(torch.empty(shape))
    if dim is not None:
        made.tensor_model_parallel, made.partition_dim, made.partition_stride = True, dim, stride  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("full", "local", "dim", "stride"),
    [((8, 6), (4, 6), 0, 1), ((8, 6), (8, 3), 1, 1), ((8, 6), (4, 6), 0, 2), ((8,), (4,), 0, 1), ((8, 6), (8, 6), None, 1)],
)
def test_shards_make_up_the_full_tensor(full: tuple[int, ...], local: tuple[int, ...], dim: int | None, stride: int) -> None:
    sharded = parameter(local, dim, stride)
    assert full_shape(sharded, 2) == full
    tensor = torch.arange(torch.Size(full).numel()).view(full)
    shards = [shard_of(tensor, sharded, rank, 2) for rank in range(2)]
    assert all(shard.shape == local for shard in shards)
    assert torch.equal(full_from_shards(shards, sharded), tensor)


def test_a_gated_matrix_gives_each_rank_rows_of_both_halves() -> None:
    gate_up = torch.arange(8).unsqueeze(1)  # rows 0-3 gate, 4-7 up
    shards = [shard_of(gate_up, parameter((4, 1), 0, stride=2), rank, 2).flatten().tolist() for rank in range(2)]
    assert shards == [[0, 1, 4, 5], [2, 3, 6, 7]]
