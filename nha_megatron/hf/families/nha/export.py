"""What an export writes beside the weights: configuration and code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nha_megatron.config import ModelConfig
from nha_megatron.hf.families.nha import configuration_nha
from nha_megatron.hf.families.nha.configuration_nha import NHAConfig
from nha_megatron.hf.families.nha.family import ARCHITECTURE, forms_of, kinds_of
from nha_megatron.hf.families.nha.modeling_source import modeling_source

AUTO_MAP = {
    "AutoConfig": "configuration_nha.NHAConfig",
    "AutoModel": "modeling_nha.NHAModel",
    "AutoModelForCausalLM": "modeling_nha.NHAForCausalLM",
}


def code_files(model: ModelConfig) -> dict[str, str]:
    """Text by file name, loaded with trust_remote_code=True."""
    return {
        "configuration_nha.py": Path(configuration_nha.__file__).read_text(encoding="utf-8"),
        "modeling_nha.py": modeling_source(kinds_of(model)),
    }


def to_hf_config(
    model: ModelConfig, *, sequence_length: int, dtype: torch.dtype = torch.float32, tokens: Mapping[str, int | None] | None = None
) -> NHAConfig:
    """Configuration of the exported model. `tokens` gives bos_token_id, eos_token_id, pad_token_id.

    Raises:
        ConfigError: a layer kind that has no Hugging Face form.
    """
    rope = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rope_theta}
    if "type" in rope:  # the older spelling
        rope["rope_type"] = rope.pop("type")
    if model.partial_rotary_factor != 1.0:
        rope["partial_rotary_factor"] = model.partial_rotary_factor
    fields: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in ARCHITECTURE}
    for form, layers in forms_of(model):
        fields |= form.to_fields(layers, model)
    fields.update(tokens or {})
    return NHAConfig(
        **fields,
        layer_kinds=[layer.kind.name for layer in model.stack],
        rope_parameters=rope,
        max_position_embeddings=sequence_length,
        initializer_range=model.init_std,
        architectures=["NHAForCausalLM"],
        auto_map=dict(AUTO_MAP),
        dtype=dtype,
    )
