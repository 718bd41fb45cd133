"""Layer pattern -> the list of `ModuleSpec`s of one pipeline stage. Local Megatron layers: no TransformerEngine, no Apex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset

from nha_megatron.layers.nha.layer import NativeHybridAttention, NativeHybridAttentionSubmodules
from nha_megatron.layers.norms import RMSNorm
from nha_megatron.model.compat import mlp_spec

if TYPE_CHECKING:
    from nha_megatron.config.model import ModelConfig


def layer_spec(window: int | None, attention_options: dict[str, Any]) -> ModuleSpec:
    """One transformer layer: RMSNorm, Native Hybrid Attention with this window, RMSNorm, SwiGLU."""
    attention = ModuleSpec(
        module=NativeHybridAttention,
        params={"window": window, **attention_options},
        submodules=NativeHybridAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, linear_gate=ColumnParallelLinear, linear_proj=RowParallelLinear
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp_spec(MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(model: ModelConfig, config: TransformerConfig, *, recompute_attention: bool, pp_rank: int, vp_stage: int | None) -> Any:
    """Specs of the layers of one pipeline stage (and model chunk `vp_stage` of it, when interleaved), and the final norm."""
    rope, rope_attention_factor = model.rope()
    options = {
        "num_slots": model.num_slots,
        "tau": model.tau,
        "empty_slots": model.empty_slots,
        "value_activation": model.value_activation,
        "output_norm": model.output_norm,
        "qk_norm": model.qk_norm,
        "rope": rope,
        "rope_attention_factor": rope_attention_factor,
        "recompute": recompute_attention,
    }
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    layers = [layer_spec(window, options) for window in model.windows[offset : offset + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
