"""Which files are read, and blocks of documents from them or from a dataset of the Hugging Face hub. Everything is streamed: no file but a
text file that is one document, and a JSON file that is one list, is ever in memory whole.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from nha_megatron.config import ConfigError
from nha_megatron.data.compressed import COMPRESSIONS, DAMAGE, open_input
from nha_megatron.data.encode import blocks_of
from nha_megatron.data.rows import Block, Counts, JsonLines, Texts, read_row, read_rows, read_whole

_KINDS = {".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
_KNOWN = f"{', '.join(_KINDS)}, all but .parquet also compressed ({', '.join(COMPRESSIONS)})"
# In a folder these describe the data and are not the data.
_ABOUT_THE_DATA = re.compile(r"(readme|licen[cs]e|changelog|contributing|citation)(\.|$)", re.IGNORECASE)

_BLOCK_BYTES = 2**20
_TEXT_BYTES = 2**23
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

DocumentUnit = Literal["file", "paragraph", "line"]


@dataclass(frozen=True)
class Span:
    """A file, or those lines of it that begin in [start, stop)."""

    path: Path
    start: int = 0
    stop: int | None = None


def expand_inputs(inputs: Sequence[str], left_out: list[Path] | None = None) -> list[Path]:
    """Files of paths, folders (all files of known kinds below, sorted) and glob patterns (sorted), in the order given.

    Of a folder, hidden files and folders (.ipynb_checkpoints, say) and files such as README.md are left out; those of known kinds are
    added to `left_out`. Raises ConfigError for an input that matches nothing, or a file of unknown kind.
    """
    files: list[Path] = []
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            known = sorted(file for file in path.rglob("*") if kind_of(file) is not None and file.is_file())
            found = [file for file in known if _is_data(file.relative_to(path))]
            if left_out is not None:
                left_out += [file for file in known if not _is_data(file.relative_to(path))]
        elif path.exists():
            found = [path]
        else:
            found = sorted(file for match in glob.glob(entry, recursive=True) if (file := Path(match)).is_file())
        if not found:
            raise ConfigError(f"input {entry!r}: no such file, or no file of a known kind ({_KNOWN}) in it. Check the path.")
        files += found
    for file in files:
        if kind_of(file) is None:
            raise ConfigError(f"input {str(file)!r}: unknown kind of file. Known are {_KNOWN}.")
    return files


def _is_data(path: Path) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts) and not _ABOUT_THE_DATA.match(path.name)


def kind_of(path: Path) -> str | None:
    """text, json or parquet."""
    compressed = path.suffix.lower() in COMPRESSIONS
    kind = _KINDS.get((path.with_suffix("") if compressed else path).suffix.lower())
    return None if compressed and kind == "parquet" else kind


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong with a file is one message that names it."""
    try:
        yield
    except ConfigError:
        raise
    except EOFError:
        raise ConfigError(f"{path}: cannot be read: it ends too early, as a download that was cut short. Copy it again.") from None
    except (OSError, UnicodeDecodeError, *DAMAGE) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:400]
        raise ConfigError(f"{path}: cannot be read ({reason}). Copy it again, or leave it out.") from None


def check_files(files: Iterable[Path], text_field: str = "text") -> list[Path]:
    """The files that hold nothing.

    Raises ConfigError for a file that does not open, or has no such column: before hours are spent on those before it.
    """
    empty = []
    for path in dict.fromkeys(files):
        if kind_of(path) == "parquet":
            holds_nothing = _open_parquet(path, text_field).metadata.num_rows == 0
        else:
            with _reading(path), open_input(path) as stream:
                holds_nothing = stream.read(1) == b""
                if holds_nothing and path.suffix.lower() in COMPRESSIONS and path.stat().st_size == 0:
                    raise EOFError
        if holds_nothing:
            empty.append(path)
    return empty


def read_blocks(spans: Iterable[Span], text_field: str = "text", unit: DocumentUnit = "file") -> Iterator[Block]:
    """The documents of files, in order.

    text_field: the field or column of a document's text in JSON lines and parquet.
    unit: what one document is in a text file: the whole file, a paragraph (up to a blank line), or a line.
    Raises ConfigError if a file cannot be read.
    """
    small: list[str] = []  # many small text files make one block
    for span in spans:
        kind = kind_of(span.path)
        if kind == "text" and unit == "file":
            with _reading(span.path), open_input(span.path) as stream:
                small.append(stream.read().decode("utf-8"))
            if len(small) >= 100 or sum(map(len, small)) > _BLOCK_BYTES:
                yield Texts(f"{span.path} and files before it", small)
                small = []
            continue
        if small:
            yield Texts(f"files before {span.path}", small)
            small = []
        with _reading(span.path):
            if kind == "text":
                with open_input(span.path) as stream:
                    yield from blocks_of(_paragraphs(stream) if unit == "paragraph" else _lines(stream), str(span.path))
            elif kind == "json":
                with open_input(span.path) as stream:
                    yield from _read_json(stream, span, text_field)
            else:
                yield from _read_parquet(span.path, text_field)
    if small:
        yield Texts("the last files", small)


def read_files(files: Sequence[Path], text_field: str = "text", unit: DocumentUnit = "file", allow_missing: float = 0.01) -> Iterator[str]:
    """The documents of the files, in order, one text each. Raises ConfigError as `read_blocks`, and when too many rows lack the field."""
    counts = Counts()
    for block in read_blocks([Span(path) for path in files], text_field, unit):
        documents = block.documents()
        counts.add(documents.counts)
        counts.require(text_field, allow_missing, complete=False)
        yield from documents.texts
    counts.require(text_field, allow_missing)


def _lines(stream: BinaryIO) -> Iterator[str]:
    for line in stream:
        yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")


def _paragraphs(stream: BinaryIO) -> Iterator[str]:
    rest = b""
    while data := stream.read(_TEXT_BYTES):
        *paragraphs, rest = re.split(rb"\r?\n\r?\n", rest + data + stream.readline())
        yield from (paragraph.decode("utf-8") for paragraph in paragraphs if paragraph)
    if rest:
        yield rest.decode("utf-8")


def is_one_value(path: Path) -> bool:
    """Whether a JSON file is one list, or one object over several lines, and not lines of objects."""
    with _reading(path), open_input(path) as stream:
        head = stream.read(2**16).removeprefix(_BYTE_ORDER_MARK).lstrip()
        if head[:1] == b"[":
            return True
        line, newline, _ = head.partition(b"\n")
        if not newline or ".json" not in (suffix.lower() for suffix in path.suffixes):
            return False
        try:
            read_row(line)
        except ValueError:
            return True
        return False


def _read_json(stream: BinaryIO, span: Span, text_field: str) -> Iterator[Block]:
    if span.start == 0 and span.stop is None and is_one_value(span.path):
        try:
            content = read_whole(stream.read().removeprefix(_BYTE_ORDER_MARK))
        except ValueError as error:
            raise ConfigError(f"{span.path}: not JSON ({error}). Give one list of objects, or one object a line.") from None
        documents = read_rows(content, str(span.path), text_field)
        yield Texts(
            str(span.path), [], Counts(rows=documents.counts.missing, missing=documents.counts.missing, example=documents.counts.example)
        )
        yield from blocks_of(documents.texts, str(span.path))
        return
    position = 0
    if span.start:
        stream.seek(span.start - 1)
        position = span.start - 1 + len(stream.readline())  # the line that begins before belongs to the span before
    start, line = position, 1
    while span.stop is None or position < span.stop:
        size = _BLOCK_BYTES if span.stop is None else min(_BLOCK_BYTES, span.stop - position)
        data = stream.read(size)
        if data[-1:] != b"\n":
            data += stream.readline()
        if not data:
            return
        position += len(data)
        yield JsonLines(str(span.path), start, line, data.removeprefix(_BYTE_ORDER_MARK) if line == 1 and not start else data, text_field)
        line += data.count(b"\n")


def _open_parquet(path: Path, text_field: str) -> Any:
    """A ParquetFile that has the column. Raises ConfigError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path}: cannot be read as parquet ({' '.join(str(error).split())[:200]}). Copy it again, or leave it out."
        ) from None
    if text_field not in schema.names:
        raise ConfigError(f"{path}: there is no field {text_field!r}. Choose --text-field from: {', '.join(schema.names)}.")
    kind = schema.field(text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind)):
        raise ConfigError(f"{path}: field {text_field!r} holds {kind}, not text. Choose --text-field from: {', '.join(schema.names)}.")
    return file


def _read_parquet(path: Path, text_field: str) -> Iterator[Block]:
    import pyarrow as pa

    file = _open_parquet(path, text_field)

    def texts() -> Iterator[str]:
        try:
            for batch in file.iter_batches(batch_size=1000, columns=[text_field]):  # the other columns are not read from disk
                yield from (text or "" for text in batch.column(batch.schema.names.index(text_field)).to_pylist())
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path}: is damaged ({reason}). Copy it again, or leave it out.") from None

    yield from blocks_of(texts(), str(path))
