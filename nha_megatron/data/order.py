"""The global order of samples: a pure function of (seed, index), and of the files.

One corpus, one epoch: the documents are permuted and laid end to end, and the stream of T tokens is cut into
N = (T - 1) // sequence_length samples. Sample s holds tokens [s S, s S + S + 1): S inputs and, shifted by one, S labels,
so neighbours share one token.

    stream   d d d d . D D D D D D D . d d d .       (. is the end-of-text token)
    sample 0 |-------|                               S = 4: inputs 0..3, labels 1..4
    sample 1         |-------|

The samples are then permuted too. The last (T - 1) % S tokens of the stream, less than one sample, are left out of the epoch;
each epoch permutes anew, so they differ. Several corpora are interleaved by `Blend`; each runs through its own epochs.

With `packing: best_fit` samples are packed from whole documents instead: see packing.py.

Since the order has no state and no length, any run can start at any index, with any number of ranks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from nha_megatron.config import ConfigError, DataConfig
from nha_megatron.data.blend import Blend
from nha_megatron.data.packing import PackedOrder
from nha_megatron.data.shuffle import derive_key, permute
from nha_megatron.data.token_files import TokenFile
from nha_megatron.data.tokenizer import tokenizer_sha256


class _Epoch(NamedTuple):
    documents: np.ndarray  # int64 [documents]: the document at each place of the stream
    starts: np.ndarray  # int64 [documents + 1]: where in the stream each place begins


class CorpusOrder:
    """The samples of one corpus, epoch after epoch. Memory: 16 bytes per document for each of the two latest epochs.

    Raises ConfigError if the corpus is shorter than one sample.
    """

    padding_share = 0.0

    def __init__(self, tokens: TokenFile, sequence_length: int, key: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.samples_per_epoch = (tokens.num_tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise ConfigError(
                f"token files {tokens.prefix!r} hold {tokens.num_tokens} tokens; one sample of data.sequence_length = "
                f"{sequence_length} needs {sequence_length + 1}. Use a larger corpus or a shorter sequence_length."
            )
        self._key = key
        # two epochs: around an epoch boundary neighbouring indexes need both
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def _build_epoch(self, epoch: int) -> _Epoch:
        documents = permute(np.arange(self.tokens.num_documents), self.tokens.num_documents, derive_key(self._key, "documents", epoch))
        starts = np.zeros(documents.size + 1, dtype=np.int64)
        np.cumsum(np.diff(self.tokens.document_starts)[documents], out=starts[1:])
        return _Epoch(documents, starts)

    def sample(self, index: int) -> np.ndarray:
        """int64 [sequence_length + 1]: sample `index` of this corpus, counted over all epochs."""
        epoch, position = divmod(index, self.samples_per_epoch)
        place = permute(np.array([position]), self.samples_per_epoch, derive_key(self._key, "samples", epoch))
        return self._read(self._epoch(epoch), int(place[0]) * self.sequence_length, self.sequence_length + 1)

    def _read(self, epoch: _Epoch, start: int, length: int) -> np.ndarray:
        out = np.empty(length, dtype=np.int64)
        place = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        filled = 0
        while filled < length:
            offset = start + filled - int(epoch.starts[place])
            count = min(length - filled, int(epoch.starts[place + 1]) - int(epoch.starts[place]) - offset)
            out[filled : filled + count] = self.tokens.read(int(epoch.documents[place]), offset, count)
            filled += count
            place += 1
        return out


class SampleOrder:
    """The samples of a weighted blend of corpora, by one global index."""

    def __init__(self, corpora: Sequence[CorpusOrder | PackedOrder], weights: Sequence[float], end_of_text: int) -> None:
        assert len(corpora) == len(weights) and len({corpus.sequence_length for corpus in corpora}) == 1
        self.corpora = list(corpora)
        self.blend = Blend(weights)
        self.end_of_text = end_of_text
        self.sequence_length = corpora[0].sequence_length
        self.padding_share = sum(corpus.padding_share * weight for corpus, weight in zip(corpora, weights, strict=True)) / sum(weights)

    def sample(self, index: int) -> np.ndarray:
        """int64 [sequence_length + 1]: global sample `index` >= 0. Every call with this index gives the same tokens.

        Packed samples have packing.PADDING at their end where there is no token.
        """
        corpus, position = self.blend.locate(index)
        return self.corpora[corpus].sample(position)


def open_samples(
    data: DataConfig,
    split: Literal["train", "validation"],
    end_of_text: int | None = None,
    vocab_size: int | None = None,
    stage: int = 1,
) -> SampleOrder:
    """Open the token files of a split and define their order.

    end_of_text: the id that the caller counts on; None takes the one that the files were made with.
    vocab_size: the model's, checked against the largest token id in the files; None skips the check.
    stage: the number of the run's stage, from 1; each has an order of its own.

    Raises ConfigError if a file is missing or damaged, was made with another tokenizer than `data.tokenizer`, has another
    end-of-text token, holds token ids that do not fit, or is shorter than one sample.
    """
    entries = data.training_blend if split == "train" else data.validation_blend
    if not entries:
        field = "data.path" if split == "train" else "data.validation"
        raise ConfigError(f"{field} names no token files. Give the prefix of files made by `nha-megatron prepare`.")
    files = [TokenFile(entry.path) for entry in entries]
    expected_hash = None if data.tokenizer is None else tokenizer_sha256(data.tokenizer)
    for tokens in files:
        if expected_hash is not None:
            tokens.check_tokenizer(expected_hash)
        if vocab_size is not None:
            tokens.check_vocabulary(vocab_size)
        end_of_text = tokens.manifest.end_of_text if end_of_text is None else end_of_text
        if tokens.manifest.end_of_text != end_of_text:
            raise ConfigError(
                f"token files {tokens.prefix!r} end documents with token {tokens.manifest.end_of_text}, expected is {end_of_text}. "
                "Prepare all corpora of a run with the same tokenizer."
            )
        if tokens.manifest.tokenizer_sha256 != files[0].manifest.tokenizer_sha256:
            raise ConfigError(
                f"token files {tokens.prefix!r} and {files[0].prefix!r} were made with different tokenizers. "
                "Prepare all corpora of a run with the same tokenizer."
            )
        require_bos(tokens, data, files[0])
    assert end_of_text is not None
    order = PackedOrder if data.packing == "best_fit" else CorpusOrder
    # A run without stages keeps the order that it has had since before there were any.
    own = () if stage == 1 else ("stage", stage)
    corpora = [order(tokens, data.sequence_length, derive_key(data.seed, split, i, *own)) for i, tokens in enumerate(files)]
    return SampleOrder(corpora, [entry.weight for entry in entries], end_of_text)


def require_bos(tokens: TokenFile, data: DataConfig, first: TokenFile) -> None:
    """Raises ConfigError if documents begin otherwise than `data.bos` says or than those of the first corpus."""
    bos = tokens.manifest.bos
    if data.bos not in (None, "none" if bos is None else "add"):
        expected = f"data.bos is {data.bos}"
    elif bos != first.manifest.bos:
        expected = f"those of {first.prefix!r} with {_begin(first)}"
    else:
        return
    raise ConfigError(
        f"the documents of token files {tokens.prefix!r} begin with {_begin(tokens)}, {expected}. Prepare all corpora of a run with the "
        "same --bos, and leave data.bos out or set it to that."
    )


def _begin(tokens: TokenFile) -> str:
    return "no token of their own" if tokens.manifest.bos is None else f"bos token {tokens.manifest.bos}"
