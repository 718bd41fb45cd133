"""Document boundaries as numbers: checked, cut into rows, and copied to a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from nha_megatron.config import ConfigError


def document_starts(cu_seqlens: tuple[int, ...], total: int) -> tuple[int, ...]:
    """First token of every non-empty document, padding behind the last included.

    Raises ConfigError for boundaries that do not describe `total` tokens.
    """
    ascending = all(a <= b for a, b in pairwise(cu_seqlens))
    if not cu_seqlens or cu_seqlens[0] != 0 or cu_seqlens[-1] > total or not ascending:
        raise ConfigError(
            f"cu_seqlens {list(cu_seqlens[:8])}{'...' if len(cu_seqlens) > 8 else ''} do not cut {total} tokens into documents: give the "
            f"ascending cumulative document lengths over all ranks, from 0 to at most {total}."
        )
    return tuple(sorted({start for start in cu_seqlens if start < total}))


def documents_of_rows(cu_seqlens: Sequence[int] | Tensor, rows: int, tokens_per_row: int) -> tuple[tuple[int, ...], ...]:
    """Cumulative document lengths of each row, 0 .. tokens_per_row, from boundaries over the rows laid end to end.

    A row's edges are always boundaries. Raises ConfigError for boundaries that do not describe rows * tokens_per_row tokens, ValueError
    for boundaries on an accelerator.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            raise ValueError(f"cu_seqlens on {cu_seqlens.device}: the exchange is planned on the host, pass integers or a CPU tensor")
        cu_seqlens = cu_seqlens.tolist()
    return _documents_of_rows(tuple(cu_seqlens), rows, tokens_per_row)


@lru_cache(maxsize=64)
def _documents_of_rows(cu_seqlens: tuple[int, ...], rows: int, tokens_per_row: int) -> tuple[tuple[int, ...], ...]:
    starts = document_starts(cu_seqlens, rows * tokens_per_row)
    edges = ((row * tokens_per_row, (row + 1) * tokens_per_row) for row in range(rows))
    return tuple((0, *(start - first for start in starts if first < start < last), tokens_per_row) for first, last in edges)


@lru_cache(maxsize=64)
def boundaries_on(device: torch.device, cu_seqlens: tuple[int, ...]) -> Tensor:
    """The boundaries on the device, copied once for all layers; from pinned memory, so that the host does not wait."""
    with torch.inference_mode(False):  # the cached tensor may be used in training next
        host = torch.tensor(cu_seqlens, dtype=torch.int32)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
