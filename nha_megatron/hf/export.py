"""From a training checkpoint to a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nha_megatron.checkpoint import load_weights_full, read_manifest, resolve
from nha_megatron.config import ConfigError, parse_config
from nha_megatron.data.identity import trained_tokens
from nha_megatron.hf.directory import MAX_SHARD_BYTES, require_writable, write_directory
from nha_megatron.hf.families.nha.export import code_files, to_hf_config
from nha_megatron.hf.families.nha.family import FAMILY, require_exportable
from nha_megatron.hf.tokenizer import exported_tokenizer, special_ids
from nha_megatron.hf.weight_table import to_hf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    with_tokenizer: bool = True,
    end_of_text: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the model of a checkpoint so that `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads it.

    Args:
        checkpoint: a checkpoint, a `checkpoints` folder or a run's folder; the newest checkpoint is taken.
        tokenizer: directory of the tokenizer; None takes the one that the run names, if it names one.
        with_tokenizer: False exports none.
        end_of_text: token that ends documents. Needed where neither the checkpoint, made by an earlier version, nor the tokenizer says.
        dtype: "fp32" or "bf16" of the written weights; None takes the precision of the run.
        say: gets a sentence about each thing in the tokenizer that is exported otherwise than it is.

    Returns:
        The checkpoint that was exported.

    Raises:
        ConfigError: no sound checkpoint, a tokenizer that is not the training's, or an output that may not be replaced.
    """
    out = Path(out)
    require_writable(out, overwrite)
    directory = resolve(checkpoint)
    manifest = read_manifest(directory)
    config = parse_config(manifest.config, source=f"the configuration in checkpoint {directory}")
    require_exportable(config.model)
    source = tokenizer if tokenizer is not None else config.data.tokenizer
    tokenizer_directory = Path(source) if with_tokenizer and source is not None else None
    trained = trained_tokens(manifest.data)
    if tokenizer_directory is not None:
        files, tokens = exported_tokenizer(tokenizer_directory, config.model.vocab_size, trained, end_of_text, say)
    elif end_of_text is not None:
        raise ConfigError("--end-of-text names a token of the tokenizer, and none is exported: give --tokenizer DIR, or leave it out")
    else:
        files, tokens = {}, special_ids(trained.end_of_text, trained.bos) if trained is not None else {}
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
        tokenizer=files,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )
    return directory
