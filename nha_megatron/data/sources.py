"""Documents from local files or from a Hugging Face dataset, streamed through `datasets`: nothing is loaded whole."""

import glob
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from nha_megatron.config import ConfigError

# what `datasets` calls the reader of each kind of file
_READERS = {".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = ".gz"

DocumentUnit = Literal["file", "paragraph", "line"]
_SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """Files of paths, folders (all files of known kinds below, sorted) and glob patterns (sorted), in the order given.

    Raises ConfigError for an input that matches nothing, or a file of unknown kind.
    """
    files: list[Path] = []
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file) is not None)
        elif path.exists():
            found = [path]
        else:
            found = sorted(file for match in glob.glob(entry, recursive=True) if (file := Path(match)).is_file())
        if not found:
            raise ConfigError(f"input {entry!r}: no such file, or no file of a known kind ({', '.join(_READERS)}) in it. Check the path.")
        files += found
    for file in files:
        if _reader(file) is None:
            raise ConfigError(f"input {str(file)!r}: unknown kind of file. Known are {', '.join(_READERS)}, also compressed (.gz).")
    return files


def _reader(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != _COMPRESSED]
    return _READERS.get(suffixes[-1]) if suffixes else None


def read_files(files: Sequence[Path], text_field: str = "text", unit: DocumentUnit = "file") -> Iterator[str]:
    """The documents of the files, in order.

    text_field: the field or column of a document's text in JSON lines and parquet.
    unit: what one document is in a text file: the whole file, a paragraph (up to a blank line), or a line.
    Raises ConfigError if a file cannot be read or has no such field.
    """
    for reader, group in groupby(files, _reader):
        assert reader is not None
        options: dict[str, Any] = {}
        if reader == "text":
            options["sample_by"] = _SAMPLE_BY[unit]
        elif reader == "parquet":
            options["columns"] = [text_field]  # the other columns are not read from disk
        names = [glob.escape(str(path)) for path in group]  # `datasets` expands patterns; ours are expanded already
        yield from _stream((reader,), {"data_files": names, "split": "train", **options}, "text" if reader == "text" else text_field)


def read_dataset(name: str, subset: str | None, split: str, text_field: str = "text") -> Iterator[str]:
    """The documents of a dataset of the Hugging Face hub (or a local dataset folder), streamed. Raises ConfigError."""
    yield from _stream((name,) if subset is None else (name, subset), {"split": split}, text_field)


def _stream(arguments: tuple[str, ...], options: dict[str, Any], text_field: str) -> Iterator[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs an error and raises it; ours is the one message
    described = ", ".join(options.get("data_files", arguments)[:3])
    try:
        for row in load_dataset(*arguments, streaming=True, **options):
            if text_field not in row:
                raise ConfigError(f"{described}: there is no field {text_field!r}. Choose --text-field from: {', '.join(row)}.")
            text = row[text_field]
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{described}: field {text_field!r} holds {type(text).__name__}, not text. Choose another --text-field.")
            yield text or ""
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        # missing files and hubs, broken JSON, parquet or UTF-8, unknown splits: `datasets` has no common class for them
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"{described}: cannot be read ({type(error).__name__}: {reason}). Check the input, the split, and the field {text_field!r}."
        ) from error
