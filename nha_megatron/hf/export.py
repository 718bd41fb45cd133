"""From a training checkpoint to a Hugging Face model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from nha_megatron.checkpoint import load_weights_full, read_manifest, resolve
from nha_megatron.config import ConfigError, parse_config
from nha_megatron.data.tokenizer import load_tokenizer
from nha_megatron.hf.directory import MAX_SHARD_BYTES, require_writable, write_directory
from nha_megatron.hf.families.nha.export import code_files, to_hf_config
from nha_megatron.hf.families.nha.family import FAMILY, require_exportable
from nha_megatron.hf.weight_table import to_hf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    with_tokenizer: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model of a checkpoint so that `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads it.

    Args:
        checkpoint: a checkpoint, a `checkpoints` folder or a run's folder; the newest checkpoint is taken.
        tokenizer: directory of the tokenizer; None takes the one that the run names, if it names one.
        with_tokenizer: False exports none.
        dtype: "fp32" or "bf16" of the written weights; None takes the precision of the run.

    Returns:
        The checkpoint that was exported.

    Raises:
        ConfigError: no sound checkpoint, a tokenizer that does not fit, or an output that may not be replaced.
    """
    out = Path(out)
    require_writable(out, overwrite)
    directory = resolve(checkpoint)
    manifest = read_manifest(directory)
    config = parse_config(manifest.config, source=f"the configuration in checkpoint {directory}")
    require_exportable(config.model)
    source = tokenizer if tokenizer is not None else config.data.tokenizer
    tokenizer_directory = Path(source) if with_tokenizer and source is not None else None
    tokens = {} if tokenizer_directory is None else special_tokens(tokenizer_directory, config.model.vocab_size)
    written = DTYPES[dtype or config.training.precision]
    stage = config.stage_at(manifest.step)  # a run in stages: the length that it has come to
    hf_config = to_hf_config(config.model, sequence_length=stage.config.data.sequence_length, dtype=written, tokens=tokens)
    weights = to_hf(load_weights_full(directory), FAMILY.entries(config.model), config.model)
    write_directory(
        out,
        hf_config,
        weights,
        dtype=written,
        code=code_files(config.model),
        tokenizer=tokenizer_directory,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )
    return directory


def special_tokens(directory: Path, vocab_size: int) -> dict[str, int | None]:
    """Ids of the tokenizer's special tokens, by their name in Hugging Face configurations.

    Raises:
        ConfigError: the tokenizer cannot be read, or has more tokens than the model.
    """
    loaded = load_tokenizer(directory)
    if loaded.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer in {directory} has {loaded.vocab_size} tokens, the model {vocab_size}: give the tokenizer that the model "
            "was trained with (--tokenizer)"
        )
    names = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {
        "bos_token_id": _token_id(loaded.tokenizer, names.get("bos_token")),
        "eos_token_id": loaded.end_of_text,
        "pad_token_id": _token_id(loaded.tokenizer, names.get("pad_token")),
    }


def _token_id(tokenizer: Tokenizer, token: object) -> int | None:
    if isinstance(token, dict):  # saved as an AddedToken
        token = token.get("content")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None
