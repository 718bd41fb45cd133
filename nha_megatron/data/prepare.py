"""From documents to token files: encode, end each document with end-of-text, divide off a validation split, write."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nha_megatron.config import ConfigError
from nha_megatron.data.encode import encode_documents
from nha_megatron.data.shuffle import derive_key
from nha_megatron.data.token_files import Manifest, TokenFileWriter
from nha_megatron.data.tokenizer import LoadedTokenizer


@dataclasses.dataclass(frozen=True)
class ValidationSplit:
    """Which documents go to PREFIX_validation: the first `documents`, or each with probability `fraction`.

    The draw is a hash of the document's number, so it does not change with the number of workers or between runs.
    """

    documents: int = 0
    fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.documents < 0 or not 0 <= self.fraction < 1:
            raise ConfigError(
                f"validation split: {self.documents} documents and fraction {self.fraction} given; documents must be at least 0, and the "
                "fraction at least 0 and below 1."
            )
        if self.documents and self.fraction:
            raise ConfigError("validation split: give a number of documents or a fraction, not both.")

    def __bool__(self) -> bool:
        return bool(self.documents or self.fraction)

    def contains(self, number: int) -> bool:
        """Whether document `number` (0-based, documents with text only) is for validation."""
        return number < self.documents or derive_key("validation", number) < self.fraction * 2**64


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote."""

    train: Manifest
    validation: Manifest | None
    empty_documents: int  # skipped


def validation_prefix(prefix: str | Path) -> str:
    """The prefix of the validation token files that belong to training files at `prefix`."""
    return f"{prefix}_validation"


def prepare(
    texts: Iterable[str],
    prefix: str | Path,
    tokenizer: LoadedTokenizer,
    *,
    source: str,
    workers: int = 1,
    validation: ValidationSplit | None = None,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> Prepared:
    """Write token files at `prefix`, and at PREFIX_validation if there is a validation split.

    texts: one string per document; those without any character but white space are skipped and counted.
    source: where the texts came from, for the manifest.
    progress: called after each document with the documents and tokens written so far.

    Raises ConfigError if a split gets no document, and whatever reading `texts` raises; then no file is written or changed.
    """
    if workers < 1:
        raise ConfigError(f"workers: {workers} given, at least 1 needed.")
    validation = validation or ValidationSplit()
    about = {
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "bos": tokenizer.bos,
        "tokenizer": tokenizer.path,
        "tokenizer_sha256": tokenizer.sha256,
        "source": source,
    }
    empty = 0

    def with_text() -> Iterator[str]:
        nonlocal empty
        for text in texts:
            if text.strip():
                yield text
            else:
                empty += 1

    begin, end = (np.array([] if token is None else [token], dtype=np.int32) for token in (tokenizer.bos, tokenizer.end_of_text))
    documents = tokens = 0
    with ExitStack() as stack:
        train_writer = stack.enter_context(TokenFileWriter(prefix, **about))  # type: ignore[arg-type]
        validation_writer = stack.enter_context(TokenFileWriter(validation_prefix(prefix), **about)) if validation else None  # type: ignore[arg-type]
        encoded = encode_documents(with_text(), f"{tokenizer.path}/tokenizer.json", workers)
        stack.callback(encoded.close)  # type: ignore[attr-defined]
        for number, ids in enumerate(encoded):
            writer = validation_writer if validation_writer is not None and validation.contains(number) else train_writer
            document = np.concatenate([begin, ids, end])
            writer.add_document(document)
            documents, tokens = number + 1, tokens + document.size
            progress(documents, tokens)
        if documents == 0:
            raise ConfigError(f"{source}: no document has any text ({empty} empty ones). Check the input and the text field.")
        for split, name in ((train_writer, "training"), (validation_writer, "validation")):
            if split is not None and split.documents == 0:
                raise ConfigError(
                    f"{source}: none of the {documents} documents fell into the {name} split. Change the size of the validation split, or "
                    "divide the text into more documents."
                )
    assert train_writer.manifest is not None
    return Prepared(train_writer.manifest, None if validation_writer is None else validation_writer.manifest, empty)
