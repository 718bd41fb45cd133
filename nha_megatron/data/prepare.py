"""From documents to token files: encode, end each document with end-of-text, divide off a validation split, write."""

import dataclasses
import glob
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from nha_megatron.config import ConfigError
from nha_megatron.data.encode import Encoded, blocks_of, encode_blocks
from nha_megatron.data.parts import Part, PartFile, divide, signature
from nha_megatron.data.rows import Block, Counts
from nha_megatron.data.shuffle import derive_key
from nha_megatron.data.sources import DocumentUnit, check_files, read_blocks
from nha_megatron.data.token_files import Manifest, TokenFileWriter, paths_of, remove_token_files
from nha_megatron.data.tokenizer import LoadedTokenizer
from nha_megatron.lock import Lock, holder
from nha_megatron.publish import remove_leftovers, writing

Progress = Callable[[int, int], None]


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
    missing: int = 0  # rows without the text field, skipped


@dataclasses.dataclass(frozen=True)
class Share:
    """Of several processes that make the parts of one input together: the `number`-th (from 0) of `of`."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ConfigError(f"share {self.number}/{self.of}: give I/N with I from 0 to N - 1.")


def validation_prefix(prefix: str | Path) -> str:
    """The prefix of the validation token files that belong to training files at `prefix`."""
    return f"{prefix}_validation"


def parts_folder(prefix: str | Path) -> Path:
    """Where the parts lie while a large input is prepared."""
    return Path(f"{prefix}.parts")


class _Output:
    """Token files at a prefix, with or without validation files beside them."""

    def __init__(
        self, prefix: str | Path, tokenizer: LoadedTokenizer, source: str, validation: ValidationSplit, workers: int, overwrite: bool
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers: {workers} given, at least 1 needed.")
        self.prefix, self.tokenizer, self.source, self.validation = Path(prefix), tokenizer, source, validation
        self._workers, self._overwrite = workers, overwrite
        self._prefixes = (prefix, validation_prefix(prefix))

    def require_free(self) -> None:
        """Raises ConfigError when there are token files that may not be replaced."""
        there = [str(path) for prefix in self._prefixes for path in paths_of(prefix) if path.exists()]
        if there and not self._overwrite:
            raise ConfigError(
                f"{', '.join(there)} {'exist' if there[1:] else 'exists'}: choose another --output, or pass --overwrite to replace the "
                "token files at this prefix, those of validation too."
            )

    def lock(self, share: Share | None = None) -> Lock:
        """One preparation at a time; shares of one may run side by side."""
        name = "lock" if share is None else f"share-{share.number}-of-{share.of}.lock"
        return Lock(self.prefix.parent / f".{self.prefix.name}.{name}", f"another preparation writes {self.prefix}")

    def remove_leftovers(self) -> None:
        """What killed commands left. Call with the lock."""
        for prefix in self._prefixes:
            remove_leftovers(Path(prefix), only_writer=True)

    def encode(self, blocks: Iterable[Block]) -> Iterator[Encoded]:
        """Encoded blocks, in order."""
        return encode_blocks(
            blocks, f"{self.tokenizer.path}/tokenizer.json", (self.tokenizer.bos, self.tokenizer.end_of_text), self._workers
        )

    def write(self, runs: Iterable[tuple[np.ndarray, np.ndarray]], counts: Counts) -> Prepared:
        """Writes (tokens, lengths) of runs of documents. `counts` are those of the input when `runs` has ended."""
        about = {
            "vocab_size": self.tokenizer.vocab_size,
            "end_of_text": self.tokenizer.end_of_text,
            "bos": self.tokenizer.bos,
            "tokenizer": self.tokenizer.path,
            "tokenizer_sha256": self.tokenizer.sha256,
            "source": self.source,
        }
        with writing(f"token files {self.prefix}", self.prefix.parent), ExitStack() as stack:
            train = stack.enter_context(TokenFileWriter(self._prefixes[0], **about))  # type: ignore[arg-type]
            held_out = stack.enter_context(TokenFileWriter(self._prefixes[1], **about)) if self.validation else None  # type: ignore[arg-type]
            for tokens, lengths in runs:
                if held_out is None:
                    train.add_documents(tokens, lengths)
                else:
                    self._divide(tokens, lengths, train, held_out)
            self._require_documents(train, held_out, counts)
            for writer in (train, held_out):
                if writer is not None:
                    writer.complete()
            for prefix in reversed(self._prefixes):
                # From here on only renames remain. What was there goes whole: old validation files belong to another corpus.
                remove_token_files(prefix)
        assert train.manifest is not None
        return Prepared(train.manifest, None if held_out is None else held_out.manifest, counts.empty, counts.missing)

    def _divide(self, tokens: np.ndarray, lengths: np.ndarray, train: TokenFileWriter, held_out: TokenFileWriter) -> None:
        first = train.documents + held_out.documents
        drawn = np.fromiter((self.validation.contains(first + i) for i in range(lengths.size)), dtype=bool, count=lengths.size)
        edges = [0, *(np.flatnonzero(drawn[1:] != drawn[:-1]) + 1).tolist(), lengths.size]
        ends = np.append(0, np.cumsum(lengths)).tolist()
        for start, stop in pairwise(edges):  # runs of documents that go to the same files
            if stop > start:
                (held_out if drawn[start] else train).add_documents(tokens[ends[start] : ends[stop]], lengths[start:stop])

    def _require_documents(self, train: TokenFileWriter, held_out: TokenFileWriter | None, counts: Counts) -> None:
        documents = train.documents + (0 if held_out is None else held_out.documents)
        if documents == 0:
            raise ConfigError(f"{self.source}: no document has any text ({counts.empty} empty ones). Check the input and the text field.")
        for split, name in ((train, "training"), (held_out, "validation")):
            if split is not None and split.documents == 0:
                raise ConfigError(
                    f"{self.source}: none of the {documents} documents fell into the {name} split. Change the size of the validation "
                    "split, or divide the text into more documents."
                )


class _Seen:
    """Counts what passes, and tells the caller."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._documents = self._tokens = 0

    def __call__(self, lengths: np.ndarray) -> None:
        for length in lengths.tolist():
            self._documents += 1
            self._tokens += length
            self._progress(self._documents, self._tokens)


def _nothing(documents: int, tokens: int) -> None:
    pass


def prepare(
    texts: Iterable[str],
    prefix: str | Path,
    tokenizer: LoadedTokenizer,
    *,
    source: str,
    workers: int = 1,
    validation: ValidationSplit | None = None,
    overwrite: bool = False,
    progress: Progress = _nothing,
) -> Prepared:
    """Write token files at `prefix`, and at PREFIX_validation if there is a validation split.

    texts: one string per document; those without any character but white space are skipped and counted.
    source: where the texts came from, for the manifest.
    overwrite: whether token files that are there may be replaced, those of validation too.
    progress: called after each document with the documents and tokens written so far.

    Raises ConfigError if a split gets no document, token files are there, another preparation writes there or the disk is full, and
    whatever reading `texts` raises; then no file is written or changed.
    """
    output = _Output(prefix, tokenizer, source, validation or ValidationSplit(), workers, overwrite)
    output.require_free()
    with output.lock():
        output.remove_leftovers()
        return _directly(output, blocks_of(texts, source), progress, lambda counts, complete: None)


def _directly(output: _Output, blocks: Iterable[Block], progress: Progress, check: Callable[[Counts, bool], None]) -> Prepared:
    seen, counts = _Seen(progress), Counts()
    encoded = output.encode(blocks)

    def runs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in encoded:
            counts.add(block.counts)
            check(counts, False)
            yield block.tokens, block.lengths
            seen(block.lengths)
        check(counts, True)

    try:
        return output.write(runs(), counts)
    finally:
        encoded.close()  # type: ignore[attr-defined]


def prepare_files(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: LoadedTokenizer,
    *,
    source: str,
    text_field: str = "text",
    unit: DocumentUnit = "file",
    allow_missing: float = 0.01,
    workers: int = 1,
    validation: ValidationSplit | None = None,
    overwrite: bool = False,
    share: Share | None = None,
    progress: Progress = _nothing,
    say: Callable[[str], None] = lambda line: None,
) -> Prepared | None:
    """`prepare` for the documents of files (`read_blocks`). A large input is made in parts, and one that was interrupted goes on.

    allow_missing: the largest share of rows that may lack the text field.
    share: make only these parts, for others to make the rest and one call without a share to join them; returns None.
    say: told, in one line each, what is worth knowing.
    """
    if not 0 <= allow_missing <= 1:
        raise ConfigError(f"--allow-missing {allow_missing} is no share: give a number from 0 to 1.")
    output = _Output(prefix, tokenizer, source, validation or ValidationSplit(), workers, overwrite)
    output.require_free()
    with output.lock(share), writing(f"token files {prefix}", output.prefix.parent):
        _require_no_others(output, share)
        if share is None:
            output.remove_leftovers()
        nothing = check_files(files, text_field)
        if nothing:
            say(f"{len(nothing)} of {len(files)} files hold nothing: {', '.join(map(str, nothing[:5]))}{' ...' if nothing[5:] else ''}")

        def check(counts: Counts, complete: bool) -> None:
            counts.require(text_field, allow_missing, complete)

        def read(part: Part) -> Iterator[Block]:
            return read_blocks(part, text_field, unit)

        parts = divide(files)
        if len(parts) == 1 and share is None:
            prepared = _directly(output, read(parts[0]), progress, check)
        else:
            about = {
                "text_field": text_field,
                "unit": unit,
                "tokenizer": tokenizer.sha256,
                "end_of_text": tokenizer.end_of_text,
                "bos": tokenizer.bos,
            }
            made = _make_parts(output, parts, read, about, share, progress, say, check)
            if share is not None:
                return None
            counts = Counts()
            for each in made.values():
                counts.add(each)
            check(counts, True)
            dtype = np.dtype(DType.optimal_dtype(tokenizer.vocab_size))
            runs = (run for number in made for run in PartFile(parts_folder(prefix), number).documents(dtype))
            prepared = output.write(runs, counts)
        shutil.rmtree(parts_folder(prefix), ignore_errors=True)
        return prepared


def _require_no_others(output: _Output, share: Share | None) -> None:
    """A share runs beside other shares, everything else alone. Called with the own lock, so that of two that start together one sees the
    other."""
    whole = output.lock().path
    if share is not None:
        owner = holder(whole)
        if owner is not None:
            raise ConfigError(f"another preparation joins {output.prefix} (process {owner.pid} on {owner.host}). Wait for it.")
        return
    for path in whole.parent.glob(f"{glob.escape(whole.name.removesuffix('lock'))}share-*.lock"):
        Lock(path, f"another preparation makes parts of {output.prefix}").acquire_and_release()


def _make_parts(
    output: _Output,
    parts: Sequence[Part],
    read: Callable[[Part], Iterator[Block]],
    about: dict[str, object],
    share: Share | None,
    progress: Progress,
    say: Callable[[str], None],
    check: Callable[[Counts, bool], None],
) -> dict[int, Counts]:
    """Makes the parts that are not there yet, of all or of a share; returns what each holds, in order."""
    folder, dtype, seen = parts_folder(output.prefix), np.dtype(DType.optimal_dtype(output.tokenizer.vocab_size)), _Seen(progress)
    own = range(len(parts)) if share is None else range(share.number, len(parts), share.of)
    made: dict[int, Counts] = {}
    total = Counts()
    found = 0
    try:
        for number in own:
            file, mark = PartFile(folder, number), signature(parts[number], about)
            counts = file.read(mark)
            if counts is not None:
                found += 1
            else:
                encoded = output.encode(read(parts[number]))
                try:
                    counts = file.write(_checked(encoded, check), mark, dtype, lambda block: seen(block.lengths))
                finally:
                    encoded.close()  # type: ignore[attr-defined]
            made[number] = counts
            total.add(counts)
            check(total, False)
    except BaseException:
        if made:
            say(f"{len(made)} of {len(own)} parts are in {folder}: the same command goes on from there; remove the folder to start anew")
        raise
    if found:
        say(f"{found} of {len(own)} parts were in {folder} already")
    return made


def _checked(encoded: Iterable[Encoded], check: Callable[[Counts, bool], None]) -> Iterator[Encoded]:
    counts = Counts()
    for block in encoded:
        counts.add(block.counts)
        check(counts, False)
        yield block
