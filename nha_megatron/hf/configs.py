"""`ModelConfig` and the `config.json` of a Hugging Face directory: one written from the other, and compared with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.hf.configuration_nha import NHAConfig

AUTO_MAP = {
    "AutoConfig": "configuration_nha.NHAConfig",
    "AutoModel": "modeling_nha.NHAModel",
    "AutoModelForCausalLM": "modeling_nha.NHAForCausalLM",
}

# (ours, theirs): what weights cannot be used without. Windows, empty_slots and RoPE may be changed on a trained model.
_ARCHITECTURE = (
    ("num_layers", "num_hidden_layers"),
    ("hidden_size", "hidden_size"),
    ("ffn_hidden_size", "intermediate_size"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("num_slots", "num_slots"),
    ("tau", "tau"),
    ("value_activation", "value_activation"),
    ("output_norm", "output_norm"),
    ("qk_norm", "qk_norm"),
    ("qkv_bias", "qkv_bias"),
    ("norm_eps", "rms_norm_eps"),
    ("tie_embeddings", "tie_word_embeddings"),
    ("vocab_size", "vocab_size"),
)


def to_hf_config(
    model: ModelConfig, *, sequence_length: int, dtype: torch.dtype = torch.float32, tokens: Mapping[str, int | None] | None = None
) -> NHAConfig:
    """Configuration of the exported model. `tokens` gives bos_token_id, eos_token_id, pad_token_id."""
    rope = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rope_theta}
    if "type" in rope:  # the older spelling
        rope["rope_type"] = rope.pop("type")
    if model.partial_rotary_factor != 1.0:
        rope["partial_rotary_factor"] = model.partial_rotary_factor
    fields: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in _ARCHITECTURE}
    fields.update(tokens or {})
    return NHAConfig(
        **fields,
        windows=list(model.windows),
        empty_slots=model.empty_slots,
        rope_parameters=rope,
        max_position_embeddings=sequence_length,
        initializer_range=model.init_std,
        architectures=["NHAForCausalLM"],
        dtype=dtype,
    )


def read_hf_config(directory: Path) -> NHAConfig:
    """The configuration of an exported directory; nothing in the directory is executed.

    Raises:
        ConfigError: there is none, it cannot be read, or it describes another kind of model.
    """
    path = directory / "config.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except FileNotFoundError:
        raise ConfigError(f"{directory} is not a Hugging Face model directory: there is no config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if model_type != NHAConfig.model_type:
        raise ConfigError(
            f"{directory} holds a model of type {model_type!r}: weights are taken from type {NHAConfig.model_type!r} only, "
            "as tools/convert_checkpoint.py writes it"
        )
    try:
        return NHAConfig.from_dict(content)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {error}") from None


def require_same_architecture(theirs: NHAConfig, ours: ModelConfig, directory: Path) -> None:
    """Raises ConfigError listing the fields in which the weights' architecture differs from `ours`."""
    differences = [
        f"model.{mine} is {getattr(ours, mine)!r}, the directory has {getattr(theirs, their)!r}"
        for mine, their in _ARCHITECTURE
        if getattr(ours, mine) != getattr(theirs, their)
    ]
    if differences:
        raise ConfigError(f"the weights in {directory} belong to another model: {'; '.join(differences)}")
