"""The loss of a model that knows only how often each token occurs: the mark a language model must fall well below."""

import numpy as np

from nha_megatron.data.token_files import TokenFile


def unigram_loss(training: TokenFile, held_out: TokenFile, vocab_size: int) -> float:
    """Cross-entropy, in nats per token, of `held_out` under the token frequencies of `training` (add-one smoothing).

    Reads both in full. Counts what training counts: every token but the first of each document, which no document predicts.
    """
    frequencies = _counts(training, vocab_size) + 1.0
    log_probabilities = np.log(frequencies / frequencies.sum())
    counts = _counts(held_out, vocab_size)
    return float(-(counts * log_probabilities).sum() / counts.sum())


def _counts(tokens: TokenFile, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document, length in enumerate(np.diff(tokens.document_starts).tolist()):
        counts += np.bincount(tokens.read(document, 1, length - 1), minlength=vocab_size)
    return counts
