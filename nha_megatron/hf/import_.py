"""Weights of an exported directory, for a run that starts from them (`model.init_from`)."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.config.json_text import read_json
from nha_megatron.hf.directory import INDEX
from nha_megatron.hf.families import read_directory
from nha_megatron.hf.weight_table import from_hf


def load_hf_weights(directory: str | Path, model: ModelConfig) -> dict[str, Tensor]:
    """Full tensors by GPTModel name, from a directory of a family that is known (`hf/families/`). Safetensors only; nothing is executed.

    What the weights can be used without may differ, such as RoPE and a window; the rest of the architecture may not.

    Raises:
        ConfigError: another kind of model or architecture, missing or damaged files.
    """
    directory = Path(directory)
    family, theirs = read_directory(directory)
    differences = family.differences(theirs, model)
    if differences:
        raise ConfigError(f"the weights in {directory} belong to another model: {'; '.join(differences)}")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        try:
            weights.update(load_file(directory / file))
        except FileNotFoundError:
            raise ConfigError(f"{directory}: {file} is missing, which the index names. Export or copy the directory again") from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{directory / file} cannot be read: {error}. Export or copy the directory again") from None
    return from_hf(weights, family.entries(model), model)


def _weight_files(directory: Path) -> list[str]:
    index = directory / INDEX
    if index.is_file():
        try:
            files = sorted(set(read_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is damaged ({type(error).__name__}: {error}). Export or copy the directory again") from None
        outside = [file for file in files if Path(str(file)).name != file]
        if outside:
            raise ConfigError(f"{index} names files outside of the directory: {', '.join(map(str, outside[:3]))}")
        return files
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise ConfigError(f"{directory} has no safetensors weights (neither {INDEX} nor model.safetensors); pickled weights are not read")
