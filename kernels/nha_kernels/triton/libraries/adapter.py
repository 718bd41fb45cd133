"""What an adapter takes and returns: the files beside this one have `forward` and `backward` as torch_flash.py documents them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Where sequences begin among the flattened queries and extended rows: int32 [N + 1] each. Rows that belong to no query's document
    are a sequence without queries."""

    queries: Tensor
    rows: Tensor


class WindowOutput(NamedTuple):
    """What a library's forward returns."""

    out: Tensor  # [B, T, HQ, V]
    lse: Tensor  # [B, T, HQ], natural logarithm, contiguous
    random_state: tuple[Tensor, ...] = ()  # of a dropout of 0, which the backward of cuDNN wants


def sequence_bounds(batch: int, num_queries: int, held: int, begin: Tensor, cu_seqlens: Tensor | None) -> Bounds:
    """`begin` [B]: the first row that the memory really holds. With documents, B = 1."""
    begin = begin.to(torch.int64)
    zero = begin.new_zeros(1)
    if cu_seqlens is not None:
        queries = cu_seqlens.to(device=begin.device, dtype=torch.int64)
        rows = torch.cat([zero, begin, held + queries[1:]])
        return Bounds(torch.cat([zero, queries]).to(torch.int32), rows.to(torch.int32))
    row = torch.arange(batch, device=begin.device)
    rows = torch.stack([row * (held + num_queries) + begin, (row + 1) * (held + num_queries)], dim=1).flatten()
    queries = torch.stack([row * num_queries, (row + 1) * num_queries], dim=1).flatten()
    return Bounds(torch.cat([zero, queries]).to(torch.int32), torch.cat([zero, rows]).to(torch.int32))


def left_of(window: int | None) -> int:
    """The `window_size_left` of flash kernels: tokens before the current one, -1 for all."""
    return -1 if window is None else window - 1
