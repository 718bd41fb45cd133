"""The stack of layers -> the list of `ModuleSpec`s of one pipeline stage. Local Megatron layers: no TransformerEngine, no Apex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset

from nha_megatron.layers.norms import RMSNorm
from nha_megatron.model.compat import mlp_spec

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig


def layer_spec(attention: Any) -> ModuleSpec:
    """One transformer layer around an attention module: RMSNorm, attention, RMSNorm, SwiGLU."""
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


def block_spec(run: RunConfig, config: TransformerConfig, *, pp_rank: int, vp_stage: int | None) -> Any:
    """Specs of the layers of one pipeline stage (and model chunk `vp_stage` of it, when interleaved), and the final norm."""
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    recompute = run.training.recompute == "selective"
    layers = [
        layer_spec(layer.kind.spec(layer.options, run.model, run.rank_shape, recompute))
        for layer in run.model.stack[offset : offset + count]
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
