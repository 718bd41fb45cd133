"""Token files that Megatron's own tools made, taken as they are: only the manifest is written beside them."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nha_megatron.config import ConfigError
from nha_megatron.data.token_files import FORMAT_VERSION, FileRecord, Manifest, TokenFile, paths_of
from nha_megatron.data.tokenizer import LoadedTokenizer
from nha_megatron.publish import write_text, writing

_AT_A_TIME = 2**26  # tokens


def adopt(prefix: str | Path, tokenizer: LoadedTokenizer, *, overwrite: bool = False) -> Manifest:
    """Writes PREFIX.json for Megatron's PREFIX.bin and PREFIX.idx. Reads them in full, and changes neither.

    Raises ConfigError if a file is missing or damaged, a token id is not the tokenizer's, or a document does not end with end-of-text.
    """
    bin_path, idx_path, json_path = paths_of(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file. Give the prefix of Megatron's files, without .bin and .idx.")
    if json_path.exists() and not overwrite:
        raise ConfigError(f"{json_path} exists: these token files have a manifest. Pass --overwrite to write it anew.")
    try:
        data = IndexedDataset(str(prefix))
        dtype, lengths, first = np.dtype(data.index.dtype), data.sequence_lengths.astype(np.int64), data.document_indices
        documents, tokens = len(first) - 1, int(lengths.sum())
        ends = np.append(0, np.cumsum(lengths))[first[1:]] - 1
        values = np.memmap(bin_path, dtype=dtype, mode="r")
    except (AssertionError, ValueError, IndexError, OSError) as error:
        raise ConfigError(f"{idx_path}: not an index of Megatron, or damaged ({str(error)[:200]}). Copy it again.") from error
    if dtype.kind not in "iu":
        raise ConfigError(f"{idx_path} says that the tokens are {dtype.name}, which are no token ids. Give token files.")
    if tokens == 0 or documents < 1 or values.size != tokens:
        raise ConfigError(f"{bin_path} has {values.size:,} tokens, {idx_path.name} says {tokens:,}. Copy both again.")
    low, high = _range(values)
    if low < 0 or high >= tokenizer.vocab_size:
        raise ConfigError(
            f"{bin_path} holds token ids from {low} to {high}, the tokenizer in {tokenizer.path} has ids below {tokenizer.vocab_size}. "
            "Give the tokenizer that made the files."
        )
    without = int((values[ends] != tokenizer.end_of_text).sum())
    if without:
        raise ConfigError(
            f"{bin_path}: {without:,} of {documents:,} documents do not end with token {tokenizer.end_of_text}, the end-of-text token. "
            "Name the one that ends them (--end-of-text), or make the files again with Megatron's --append-eod."
        )
    begins = values[np.append(0, ends[:-1] + 1)]
    if tokenizer.bos is not None and (begins != tokenizer.bos).any():
        raise ConfigError(f"{bin_path}: not every document begins with token {tokenizer.bos}, the bos token. Leave out --bos add.")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        documents=documents,
        tokens=tokens,
        dtype=dtype.name,
        max_token_id=high,
        end_of_text=tokenizer.end_of_text,
        bos=tokenizer.bos,
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        source=f"Megatron's files {prefix}",
        bin=FileRecord.of(bin_path),
        idx=FileRecord.of(idx_path),
    )
    with writing(str(json_path), json_path.parent):
        write_text(json_path, manifest.to_json())
    try:
        TokenFile(prefix)
    except ConfigError:
        json_path.unlink()
        raise
    return manifest


def _range(values: np.ndarray) -> tuple[int, int]:
    parts = [values[start : start + _AT_A_TIME] for start in range(0, values.size, _AT_A_TIME)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
