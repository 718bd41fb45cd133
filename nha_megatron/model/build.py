"""RunConfig -> Megatron's TransformerConfig -> the GPTModel of each model chunk on this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from nha_megatron.model.compat import mark_tensor_parallel_weights
from nha_megatron.model.language_model import LanguageModel
from nha_megatron.model.parameters import global_parameters
from nha_megatron.model.specs import block_spec
from nha_megatron.model.weights import weight_named

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: RunConfig, *, fuse_gradients: bool = False) -> TransformerConfig:
    """Megatron's configuration of the run: local layers, no fused kernels that need Apex or TransformerEngine, but for `fuse_gradients`."""
    model, parallel, training = config.model, config.parallel, config.training
    dtype = _DTYPES[training.precision]
    chunks_per_rank = parallel.virtual_pipeline or 1
    recompute: dict[str, Any] = {}
    if training.recompute == "full":
        # Each layer by itself: all of them (uniform, in groups of one), or the first ones of this model chunk (block).
        method, count = ("uniform", 1) if training.recompute_layers is None else ("block", training.recompute_layers)
        recompute = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": count}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks_per_rank if chunks_per_rank > 1 else None,
        pipeline_dtype=dtype,
        # One send or receive at a time under the interleaved schedule: with two stages both neighbours are the same rank, and messages
        # of one batch to it would be taken for each other.
        overlap_p2p_comm=chunks_per_rank > 1,
        batch_p2p_comm=chunks_per_rank == 1,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights are left empty here, on the device of the surrounding `torch.device` context, and drawn by model/initialize.py.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Gradients are sums over tokens, divided once by the global count: exact for any loss mask and layout.
        calculate_per_token_loss=True,
        # Checkpoint keys carry the layer number, so that layers of one stack may differ.
        hetereogenous_dist_checkpoint=True,
        # The fused forms need Apex, or torch.compile on the CPU.
        gradient_accumulation_fusion=fuse_gradients,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **recompute,
    )


def build_model(
    config: RunConfig, device: torch.device, groups: ProcessGroupCollection, *, fuse_gradients: bool = False
) -> list[LanguageModel]:
    """This rank's model chunks with uninitialised weights on `device`: one, or `virtual_pipeline` of them when interleaved.

    fuse_gradients: linear layers add their gradients to the `main_grad` of Megatron's DistributedDataParallel (engine/gradient_fusion.py).
    """
    megatron_config = transformer_config(config, fuse_gradients=fuse_gradients)
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    chunks_per_rank = config.parallel.virtual_pipeline or 1
    chunks = []
    for chunk in range(chunks_per_rank):
        vp_stage = chunk if chunks_per_rank > 1 else None
        spec = block_spec(config, megatron_config, pp_rank=pp_rank, vp_stage=vp_stage)
        with device:
            model = LanguageModel(
                real_vocab_size=config.model.vocab_size,
                z_loss=config.training.z_loss,
                config=megatron_config,
                transformer_layer_spec=spec,
                vocab_size=config.model.padded_vocab_size,
                max_sequence_length=config.data.sequence_length,
                pre_process=pp_rank == 0 and chunk == 0,
                post_process=pp_rank == pp_size - 1 and chunk == chunks_per_rank - 1,
                share_embeddings_and_output_weights=config.model.tie_embeddings,
                # Positions enter in the attention layers, relative to the window.
                position_embedding_type="none",
                pg_collection=groups,
                vp_stage=vp_stage,
            )
        mark_tensor_parallel_weights(model)
        chunks.append(model)
    _mark_decay(config, chunks)
    return chunks


def build_meta_model(config: RunConfig, groups: ProcessGroupCollection) -> LanguageModel:
    """The whole model on the meta device: shapes without memory. `groups` is a grid of one rank, whatever `config.parallel` says."""
    single = config.model_copy(update={"parallel": type(config.parallel)()})
    (model,) = build_model(single, torch.device("meta"), groups)
    return model


def _mark_decay(config: RunConfig, chunks: list[LanguageModel]) -> None:
    """Tells the engines which weights AdamW decays: what the table of weights says of each."""
    for name, parameter in global_parameters(chunks):
        parameter.no_weight_decay = not weight_named(config.model, name).decayed
