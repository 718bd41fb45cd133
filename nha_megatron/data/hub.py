"""Documents of a dataset of the Hugging Face hub, or of a dataset folder, streamed through `datasets`."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nha_megatron.config import ConfigError
from nha_megatron.data.sources import kind_of, read_files


def read_dataset(name: str, subset: str | None, split: str, text_field: str = "text", allow_missing: float = 0.01) -> Iterator[str]:
    """The text of every row. Raises ConfigError."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs an error and raises it; ours is the one message
    arguments = (name,) if subset is None else (name, subset)
    try:
        builder = load_dataset_builder(*arguments)
        files = _json_files(builder, split)
        if files:
            # `datasets` infers a schema for JSON, by which a text that looks like a date becomes another text.
            yield from read_files(files, text_field, allow_missing=allow_missing)
            return
        if builder.name == "json":
            warnings.warn(
                f"{name} is JSON on the hub, for which `datasets` infers a schema: a text that looks like a date may become another text. "
                "To keep every byte, download the files and give them with --input.",
                stacklevel=2,
            )
        for row in load_dataset(*arguments, split=split, streaming=True):
            if text_field not in row:
                raise ConfigError(f"{name}: there is no field {text_field!r}. Choose --text-field from: {', '.join(row)}.")
            text = row[text_field]
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{name}: field {text_field!r} holds {type(text).__name__}, not text. Choose another --text-field.")
            yield text or ""
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        # missing files and hubs, broken parquet or UTF-8, unknown splits: `datasets` has no common class for them
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(
            f"{name}: cannot be read ({type(error).__name__}: {reason}). Check the input, the split, and the field {text_field!r}."
        ) from error


def _json_files(builder: Any, split: str) -> list[Path]:
    """The files of a split, where they are JSON and lie on this machine."""
    files = (builder.config.data_files or {}).get(split, []) if builder.config.data_files else []
    paths = [Path(str(file)) for file in files]
    return paths if all(path.is_file() and kind_of(path) == "json" for path in paths) else []
