"""Which rank sends what to whom so that every shard can continue from the memory before it. Pure arithmetic, no ranks needed.

Rank r of R holds the contiguous tokens [r L, (r + 1) L). Its first query needs the memory at r L: the last W tokens before
it (the halo) and the slots, which hold what is older. The slots are an affine recurrence, so what a run of tokens does to them
is a summary of fixed size. With f, m = divmod(W, L) the slots of rank r hold exactly the tokens before r L - W, so shards are
cut for the summaries at L - m into two pieces A and B, and rank r composes the pieces that end at or before r L - W.

With L = 8, W = 3 (f = 0, m = 3), without documents, seen from rank 2:

    token     0        8        16       24
    rank      |   0    |   1    |   2    |
    piece     |AAAAABBB|AAAAABBB|AAAAABBB|
    rank 2     sssssssssssss hhh^             s: composed from pieces A0, B0, A1    h: halo, the last 3 tokens of rank 1

With L = 4, W = 6 (f = 1, m = 2), seen from rank 3, in documents of 3 and 13 tokens:

    token     0    4    8    12   16
    rank      | 0  | 1  | 2  | 3  |
    piece     |AABB|AABB|AABB|AABB|
    document  |aaa|bbbbbbbbbbbbbbb|
    rank 3        s ss hh hhhh^               s: B0 cut at the boundary, A1         h: last 2 tokens of rank 1, all of rank 2

A document that starts inside a piece cuts it: only what follows the last boundary is announced. A rank whose first token
belongs to a document that starts at or after r L - W composes nothing: its slots are empty.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from nha_megatron.layers.boundaries import document_starts


@dataclass(frozen=True)
class HaloTransfer:
    """Tokens [start, stop) of the sender's shard (0 is its first token), and the rank at the other end."""

    rank: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Piece:
    """A run of this rank's tokens whose effect on the slots is announced to all ranks.

    All announced pieces of all ranks are numbered in token order: piece j of rank r has number r * (pieces per rank) + j.

    Attributes:
        number: this piece's number.
        start, stop: tokens of the shard that are announced; start lies behind the last document boundary inside the piece.
        before: numbers of the pieces that make up the slots just before `start`, in the same document.
        consumers: ranks whose initial slots contain this piece.
        followers: how many pieces follow it in the slots of the first consumer; each further consumer has (pieces per rank) more.
    """

    number: int
    start: int
    stop: int
    before: range
    consumers: range
    followers: int


@dataclass(frozen=True)
class ContextParallelPlan:
    """One rank's part in the exchange of a layer.

    Attributes:
        rank, num_ranks, tokens_per_rank, window: as given.
        receives: halo of this rank in token order, by source rank.
        sends: what this rank sends, by destination rank.
        pieces: what this rank announces; the same number (0, 1 or 2) on every rank.
        initial: numbers of the pieces that compose this rank's initial slots, in token order.
        length: tokens of the first token's document before this shard: `Memory.length`.
        cu_seqlens: [N + 1] cumulative document lengths inside the shard, 0 .. tokens_per_rank, or None without documents.
    """

    rank: int
    num_ranks: int
    tokens_per_rank: int
    window: int
    receives: tuple[HaloTransfer, ...]
    sends: tuple[HaloTransfer, ...]
    pieces: tuple[Piece, ...]
    initial: range
    length: int
    cu_seqlens: tuple[int, ...] | None

    @property
    def halo_tokens(self) -> int:
        """Tokens received: min(window, length)."""
        return sum(receive.tokens for receive in self.receives)

    @property
    def receive_splits(self) -> list[int]:
        """Tokens received from each rank, for `all_to_all_single`."""
        return _tokens_by_rank(self.receives, self.num_ranks)

    @property
    def send_splits(self) -> list[int]:
        """Tokens sent to each rank, for `all_to_all_single`."""
        return _tokens_by_rank(self.sends, self.num_ranks)

    @property
    def first_sent_token(self) -> int:
        """First token of this shard that any rank receives; tokens_per_rank when none does."""
        return min((send.start for send in self.sends), default=self.tokens_per_rank)


def plan_context_parallel(
    *, tokens_per_rank: int, num_ranks: int, rank: int, window: int, cu_seqlens: Sequence[int] | None = None
) -> ContextParallelPlan:
    """The exchange of one layer as rank `rank` sees it.

    Args:
        tokens_per_rank: L >= 1, the same on every rank.
        num_ranks: R >= 1.
        rank: 0 <= rank < R.
        window: W >= 0, counting the current token; may exceed L and R L.
        cu_seqlens: cumulative document lengths over all R L tokens, starting at 0, or None for one document. Tokens behind the
            last entry are a document of their own (padding). Empty documents are ignored.

    Raises:
        ConfigError: cu_seqlens that do not describe R L tokens.
    """
    assert tokens_per_rank >= 1 and 0 <= rank < num_ranks and window >= 0, (tokens_per_rank, num_ranks, rank, window)
    return _plan(tokens_per_rank, num_ranks, rank, window, None if cu_seqlens is None else tuple(cu_seqlens))


@lru_cache(maxsize=256)  # layers with the same window share the plan
def _plan(tokens_per_rank: int, num_ranks: int, rank: int, window: int, cu_seqlens: tuple[int, ...] | None) -> ContextParallelPlan:
    boundaries = (0,) if cu_seqlens is None else document_starts(cu_seqlens, tokens_per_rank * num_ranks)
    shards = _Shards(tokens_per_rank, num_ranks, window, boundaries)
    first, last = rank * tokens_per_rank, (rank + 1) * tokens_per_rank
    sends = (
        HaloTransfer(destination, transfer.start, transfer.stop)
        for destination in range(rank + 1, num_ranks)
        for transfer in shards.halo(destination)
        if transfer.rank == rank
    )
    return ContextParallelPlan(
        rank=rank,
        num_ranks=num_ranks,
        tokens_per_rank=tokens_per_rank,
        window=window,
        receives=shards.halo(rank),
        sends=tuple(sends),
        pieces=tuple(shards.piece(rank * shards.pieces_per_rank + j) for j in range(shards.pieces_per_rank)),
        initial=shards.composed_by(rank),
        length=first - shards.document_start(first),
        cu_seqlens=None if cu_seqlens is None else (0, *(start - first for start in boundaries if first < start < last), last - first),
    )


@dataclass(frozen=True)
class _Shards:
    """What every rank knows about every other: shards, window and documents, in tokens of the whole sequence."""

    tokens_per_rank: int
    num_ranks: int
    window: int
    boundaries: tuple[int, ...]

    def document_start(self, token: int) -> int:
        return self.boundaries[bisect_right(self.boundaries, token) - 1]

    def halo(self, rank: int) -> tuple[HaloTransfer, ...]:
        """The last min(W, length) tokens before the shard, one transfer per shard that holds some of them."""
        shard, stop = self.tokens_per_rank, rank * self.tokens_per_rank
        start = max(stop - self.window, self.document_start(stop))
        sources = range(start // shard, rank)
        return tuple(HaloTransfer(source, max(start - source * shard, 0), min(stop - source * shard, shard)) for source in sources)

    @cached_property
    def piece_edges(self) -> tuple[int, ...]:
        """Where a shard is cut into pieces, without those that no rank composes: the same on every rank."""
        shifted = self.window % self.tokens_per_rank
        edges = (0, self.tokens_per_rank - shifted) + ((self.tokens_per_rank,) if shifted else ())
        while len(edges) > 1 and not any(self._composes_piece_like(edges[-2:], rank) for rank in range(self.num_ranks)):
            edges = edges[:-1]
        return edges

    def _composes_piece_like(self, edges: tuple[int, ...], rank: int) -> bool:
        """Whether the slots of `rank` contain the piece with these edges of any shard."""
        stop = rank * self.tokens_per_rank
        source = (stop - self.window - edges[1]) // self.tokens_per_rank  # the last shard whose piece has left the window
        return source >= 0 and source * self.tokens_per_rank + edges[1] > self.document_start(stop)

    @property
    def pieces_per_rank(self) -> int:
        return len(self.piece_edges) - 1

    def piece_range(self, number: int) -> tuple[int, int]:
        """Tokens of piece `number`, before any cut."""
        rank, j = divmod(number, self.pieces_per_rank)
        edges = self.piece_edges
        return rank * self.tokens_per_rank + edges[j], rank * self.tokens_per_rank + edges[j + 1]

    def pieces_ending_by(self, token: int) -> int:
        """How many pieces end at or before `token`."""
        shards, rest = divmod(max(token, 0), self.tokens_per_rank)
        return shards * self.pieces_per_rank + sum(edge <= rest for edge in self.piece_edges[1:])

    def pieces_between(self, start: int, stop: int) -> range:
        """Numbers of the pieces that end in (start, stop]."""
        first = self.pieces_ending_by(start)
        return range(first, max(first, self.pieces_ending_by(stop)))

    def composed_by(self, rank: int) -> range:
        stop = rank * self.tokens_per_rank
        return self.pieces_between(self.document_start(stop), stop - self.window)

    def piece(self, number: int) -> Piece:
        uncut_start, stop = self.piece_range(number)
        document = self.document_start(stop - 1)
        start = max(uncut_start, document)
        consumers = [rank for rank in range(self.num_ranks) if number in self.composed_by(rank)]
        first_token = number // self.pieces_per_rank * self.tokens_per_rank
        return Piece(
            number=number,
            start=start - first_token,
            stop=stop - first_token,
            before=self.pieces_between(document, start),
            consumers=range(consumers[0], consumers[-1] + 1) if consumers else range(0),
            followers=self.composed_by(consumers[0]).stop - number - 1 if consumers else 0,
        )


def _tokens_by_rank(transfers: tuple[HaloTransfer, ...], num_ranks: int) -> list[int]:
    tokens = [0] * num_ranks
    for transfer in transfers:
        tokens[transfer.rank] += transfer.tokens
    return tokens
