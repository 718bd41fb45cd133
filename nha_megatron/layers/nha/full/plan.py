"""Which queries of a full-attention layer a rank computes when it has gathered all keys and values. Pure arithmetic.

Tokens lie in order: rank r of R holds [r L, (r + 1) L). A query at t sees t + 1 keys, so computing its own queries would give the last
rank about twice the mean. Rank r therefore keeps the first half of its queries and takes the second half of rank R - 1 - r:

    R = 4         rank 0    rank 1    rank 2    rank 3
    queries of   | 0 : 3   | 1 : 2   | 2 : 1   | 3 : 0   |     first half : second half
    keys seen      1 + 8     3 + 6     5 + 4     7 + 2         in halves of a shard, the last one triangular: 9 everywhere
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nha_megatron.layers.boundaries import document_starts


@dataclass(frozen=True)
class QueryRun:
    """Consecutive queries [start, stop) of the whole sequence, and the keys [first_key, stop) that they need.

    Attributes:
        first_key: where the document of token `start` begins.
        cu_seqlens: cumulative document lengths inside the run, 0 .. stop - start; None when it lies in one document.
    """

    start: int
    stop: int
    first_key: int
    cu_seqlens: tuple[int, ...] | None

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def preceding(self) -> int:
        """Keys before the run."""
        return self.start - self.first_key


@dataclass(frozen=True)
class QueryHalves:
    """What rank `rank` computes: the first half of its own queries, and the second half of its partner's."""

    rank: int
    partner: int
    own: QueryRun
    foreign: QueryRun

    def splits(self, num_ranks: int) -> list[int]:
        """Tokens that go to, and come from, each rank when second halves are exchanged, for `all_to_all_single`."""
        return [self.foreign.tokens if rank == self.partner else 0 for rank in range(num_ranks)]


def plan_query_halves(*, tokens_per_rank: int, num_ranks: int, rank: int, cu_seqlens: Sequence[int] | None = None) -> QueryHalves:
    """The halves of rank `rank`. Arguments as `plan_context_parallel`. Raises ConfigError for cu_seqlens that do not fit."""
    assert tokens_per_rank >= 1 and 0 <= rank < num_ranks, (tokens_per_rank, num_ranks, rank)
    return _plan(tokens_per_rank, num_ranks, rank, None if cu_seqlens is None else tuple(cu_seqlens))


@lru_cache(maxsize=64)  # all full layers share the plan
def _plan(tokens_per_rank: int, num_ranks: int, rank: int, cu_seqlens: tuple[int, ...] | None) -> QueryHalves:
    starts = (0,) if cu_seqlens is None else document_starts(cu_seqlens, tokens_per_rank * num_ranks)
    partner, middle = num_ranks - 1 - rank, (tokens_per_rank + 1) // 2
    return QueryHalves(
        rank=rank,
        partner=partner,
        own=_run(starts, rank * tokens_per_rank, rank * tokens_per_rank + middle),
        foreign=_run(starts, partner * tokens_per_rank + middle, (partner + 1) * tokens_per_rank),
    )


def _run(starts: tuple[int, ...], start: int, stop: int) -> QueryRun:
    inside = starts[bisect_right(starts, start) : bisect_left(starts, stop)]
    return QueryRun(
        start=start,
        stop=stop,
        first_key=starts[bisect_right(starts, start) - 1],
        cu_seqlens=(0, *(boundary - start for boundary in inside), stop - start) if inside else None,
    )
