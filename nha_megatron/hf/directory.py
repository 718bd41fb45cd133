"""Writes a Hugging Face model directory: complete under its name, or not there.

config.json, generation_config.json
model.safetensors or model-0000i-of-0000n.safetensors, and model.safetensors.index.json in both cases
the family's code                         loaded with trust_remote_code=True; needs torch and transformers alone
tokenizer files, where a tokenizer is given
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from nha_megatron.config import ConfigError
from nha_megatron.publish import published_directory, writing

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


def require_writable(directory: Path, overwrite: bool) -> None:
    """Raises ConfigError when `directory` may not be written or replaced. Called before any work is done."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ConfigError(f"{directory} exists and is not a directory: choose another output")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{directory} is not empty: choose another output, or pass --overwrite to replace it")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} has no config.json, so it is not a model directory and is not replaced: choose another output")


def write_directory(
    directory: Path,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    code: Mapping[str, str],
    tokenizer: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write everything aside, make it durable, and give it its name in one rename.

    Args:
        weights: by Hugging Face name; converted to `dtype` shard by shard.
        code: text of the files by name that transformers loads with trust_remote_code=True.
        tokenizer: content of the tokenizer's files by name.

    Raises:
        ConfigError: `directory` is not empty and may not be replaced.
    """
    require_writable(directory, overwrite)
    with writing(str(directory), directory.parent), published_directory(directory) as aside:
        config.dtype = dtype
        config.save_pretrained(aside)
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(aside)
        write_safetensors(aside, weights, dtype, max_shard_bytes)
        for name, text in code.items():
            (aside / name).write_text(text, encoding="utf-8")
        for name, content in (tokenizer or {}).items():
            (aside / name).write_bytes(content)


def write_safetensors(directory: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Shards of at most `max_shard_bytes` (a larger tensor has its own) and the index that names the shard of every weight."""
    shards = split_into_shards({name: tensor.numel() * dtype.itemsize for name, tensor in weights.items()}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name].to(dtype).contiguous() for name in names}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.numel() for tensor in weights.values())
    index = {"metadata": {"total_parameters": total, "total_size": total * dtype.itemsize}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in set(weight_map.values()):
        shutil.copymode(directory / INDEX, directory / file)  # safetensors makes files that only their owner can read


def split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut where the next one would not fit any more."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
