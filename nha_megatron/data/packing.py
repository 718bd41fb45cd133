"""Whole documents packed into samples by best fit: the order of samples under `packing: best_fit`.

    documents  AAAAAAAAAAA. BBB. CCCC. DD. E.       (. is the end-of-text token, S = 8)
    samples    AAAAAAAA  AAA.BBB.  CCCC.DD.  E.######         # padding

A document longer than a sample is split: full pieces of S tokens are samples of their own, whose last label is the document's next token;
the rest is packed like a short document. So every token of the corpus is an input exactly once in an epoch, and every token but the first
of each document a label. What stays free at the end of a sample is padding.

The documents are permuted once and packed in blocks, by best-fit decreasing (D. S. Johnson, 1973): longest first, each into the fullest
sample that has room. The packing does not change from epoch to epoch, the order of samples does: attention is confined to documents, so
those beside a document do not matter to it, and a constant number of samples an epoch makes any index as cheap as any other.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np

from nha_megatron.data.shuffle import derive_key, permute
from nha_megatron.data.token_files import TokenFile

# Stands in a sample where there is no token. `make_batch` masks it.
PADDING = -1

# A block is large enough that the last, half empty samples of it do not count, and no larger: the time of a document grows with the
# number of samples that have room.
_BLOCK_DOCUMENTS = 2**14
_BLOCK_SAMPLES = 256


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of items whose lengths add up to at most `capacity`: longest item first, each into the fullest bin with room for it.

    lengths: each in 1 .. capacity. Returns the items of every bin in ascending order.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free places, bin), ascending; full bins are left out
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        place = bisect_left(free, (length, -1))
        if place < len(free):
            room, number = free.pop(place)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(item)
        if room > length:
            insort(free, (room - length, number))
    # In the order of the items, so that the long documents do not all stand at the front, on the first context rank.
    return [sorted(items) for items in bins]


class PackedOrder:
    """The samples of one corpus, packed, epoch after epoch; the same use as `CorpusOrder`.

    Opening packs the corpus: 2 to 7 seconds for a million documents (samples of 128k down to 2k tokens). Memory: 16 bytes for each piece
    of a document and 8 for each sample.
    """

    def __init__(self, tokens: TokenFile, sequence_length: int, key: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self._key = key
        documents, starts, counts = (np.concatenate(parts) for parts in zip(*self._pack_blocks(), strict=True))
        self._documents: np.ndarray = documents  # int64 [pieces], those of a sample beside each other
        self._starts: np.ndarray = starts  # int64 [pieces]: a piece's first token in its document
        self._first_piece: np.ndarray = np.concatenate([[0], np.cumsum(counts)])  # int64 [samples + 1]
        self.samples_per_epoch = int(counts.size)

    @property
    def padding_share(self) -> float:
        """The share of the places for tokens that stays empty."""
        return 1 - self.tokens.num_tokens / (self.samples_per_epoch * self.sequence_length)

    def sample(self, index: int) -> np.ndarray:
        """int64 [sequence_length + 1]: sample `index` of this corpus, counted over all epochs. PADDING at its end."""
        epoch, position = divmod(index, self.samples_per_epoch)
        place = int(permute(np.array([position]), self.samples_per_epoch, derive_key(self._key, "samples", epoch))[0])
        out = np.full(self.sequence_length + 1, PADDING, dtype=np.int64)
        filled = 0
        for piece in range(int(self._first_piece[place]), int(self._first_piece[place + 1])):
            document, start = int(self._documents[piece]), int(self._starts[piece])
            rest = int(self.tokens.document_starts[document + 1] - self.tokens.document_starts[document]) - start
            # Of a document that goes on after the sample one token more: the label of the last input.
            count = min(rest, out.size)
            out[filled : filled + count] = self.tokens.read(document, start, count)
            filled += count
        return out

    def _pack_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each block: the document and the first token of each piece, and how many pieces each sample has."""
        total, key = self.tokens.num_documents, derive_key(self._key, "packing")
        lengths = np.diff(self.tokens.document_starts)
        # Long samples need more documents to fill as many.
        size = max(_BLOCK_DOCUMENTS, -(-_BLOCK_SAMPLES * self.sequence_length * total // self.tokens.num_tokens))
        for begin in range(0, total, size):
            documents = permute(np.arange(begin, min(begin + size, total)), total, key)
            yield _pack(documents, lengths[documents], self.sequence_length)


def _pack(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    full, rest = np.divmod(lengths, capacity)
    # The number of each full piece within its document: 0, 1, ... for every document.
    number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    short = np.flatnonzero(rest)
    bins = best_fit_decreasing(rest[short].tolist(), capacity)
    packed = short[np.array([item for items in bins for item in items], dtype=np.int64)]
    return (
        np.concatenate([np.repeat(documents, full), documents[packed]]),
        np.concatenate([number * capacity, full[packed] * capacity]),
        np.concatenate([np.ones(number.size, dtype=np.int64), np.array([len(items) for items in bins], dtype=np.int64)]),
    )
