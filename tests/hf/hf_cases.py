"""Small models for the Hugging Face tests."""

from typing import Any

import torch
from torch import Tensor

from nha_megatron.config import ModelConfig
from nha_megatron.hf.families.nha.export import to_hf_config
from nha_megatron.hf.families.nha.family import FAMILY
from nha_megatron.hf.families.nha.modeling_nha import NHAForCausalLM
from nha_megatron.hf.weight_table import to_hf

# Every branch of the layer is taken by one of these.
VARIANTS: dict[str, dict[str, Any]] = {
    "from_scratch": {},
    "converted": {"value_activation": "none", "output_norm": "none", "qk_norm": "rms", "qkv_bias": True, "empty_slots": "weight"},
    "masked_tied": {"empty_slots": "mask", "tie_embeddings": True, "head_dim": 12},
    "partial_rotary_one_group": {"partial_rotary_factor": 0.5, "num_kv_heads": 1, "rope_theta": 500.0},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "tau": 4.0},
}


def tiny_model(**fields: Any) -> ModelConfig:
    """Three layers with a window, full attention and slots alone; a vocabulary that needs padding."""
    sizes = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "num_slots": 5, "vocab_size": 61}
    return ModelConfig(**{**sizes, "window": "4,full,0", **fields})


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Full GPTModel weights, far from initialisation so that every weight matters; padding rows of the vocabulary are zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in FAMILY.entries(model):
        noise = torch.randn(entry.shape, generator=generator)
        is_norm = "norm" in entry.ours
        weights[entry.ours] = 1 + 0.2 * noise if is_norm else 0.3 * noise
        if entry.shape[0] == model.padded_vocab_size:
            weights[entry.ours][model.vocab_size :] = 0
    return weights


def hf_model(model: ModelConfig, seed: int = 0) -> NHAForCausalLM:
    """The Hugging Face model in evaluation mode with `random_weights`."""
    hf = NHAForCausalLM(to_hf_config(model, sequence_length=64, tokens={"eos_token_id": 0, "pad_token_id": 1}))
    weights = to_hf(random_weights(model, seed), FAMILY.entries(model), model)
    missing = hf.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"} and not missing.unexpected_keys
    hf.tie_weights()
    return hf.eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Ids that are neither the end-of-text (0) nor the padding token (1) of `hf_model`."""
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))
