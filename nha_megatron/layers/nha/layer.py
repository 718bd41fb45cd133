"""Native Hybrid Attention (arXiv 2510.07019) as the `self_attention` of a Megatron-core transformer layer.

Shapes: s tokens of this context-parallel rank, b batch, h hidden size, D head size, M slots, and per TP rank H KV heads and HQ = H * r
query heads. Under sequence parallelism the input and output hold s / tp tokens; between the projections all s tokens are there.

    hidden [s, b, h] -- linear_qkv --> q [s, b, HQ, D], k [s, b, H, D], v [s, b, H, D] -- qk norm, value activation --+
             |                                                                                                        v
             +--------- linear_gate -> z [s, b, H, M] -> log-gates logsigmoid(z) / tau ------------------> window/slot operator
                                                                                                                      |
    output [s, b, h] <-- linear_proj -- output norm over all heads <-- [s, b, HQ * D] <-------------------------------+
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nha_kernels import AttentionOptions, attention_statistics, hybrid_attention
from nha_megatron.layers.documents import Documents
from nha_megatron.layers.nha.config import NHAOptions
from nha_megatron.layers.nha.context_parallel.exchange import context_parallel_attention, context_parallel_statistics
from nha_megatron.layers.nha.full.over_ranks import full_attention_over_ranks, full_attention_statistics
from nha_megatron.layers.norms import HeadRMSNorm, HeadsRMSNorm


@dataclass
class NativeHybridAttentionSubmodules:
    """Linear layers of the attention: classes or specs with Megatron's column- and row-parallel signature."""

    linear_qkv: ModuleSpec | type
    linear_gate: ModuleSpec | type
    linear_proj: ModuleSpec | type


class NativeHybridAttention(MegatronModule):
    """Slots and window under one softmax.

    Args:
        config: Megatron's configuration; head counts and sizes are read from it.
        layer_number: global, from 1.
        options: window, slots and conventions of this layer.
        rope: inverse frequencies [rotary_dim / 2], on the CPU; rope_attention_factor: YaRN's factor.
        exchange: of full attention over several context ranks: `a2a` or `all_gather`.
        recompute: recompute the operator (and its context-parallel exchange) in the backward instead of keeping what it saves.
        pg_collection: process groups; `.tp` and `.cp` are used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: NativeHybridAttentionSubmodules,
        layer_number: int,
        *,
        options: NHAOptions,
        rope: Tensor,
        rope_attention_factor: float = 1.0,
        exchange: str | None = None,
        recompute: bool = False,
        pg_collection: ProcessGroupCollection,
        **_: Any,  # keywords that Megatron passes to every attention: cp_comm_type, pp_layer_offset, name
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.options = options
        self.recompute = recompute
        self.exchange = exchange
        self.cp_group = pg_collection.cp
        self.tp_group = pg_collection.tp  # MegatronModule.sharded_state_dict looks for it under this name
        # Not a buffer: a bfloat16 model would round the frequencies with the weights.
        self._attention_options = AttentionOptions(options.window, rope, rope_attention_factor, empty_slots=options.empty_slots)

        num_heads, num_kv_heads = config.num_attention_heads, config.num_query_groups
        tp_size = self.tp_group.size()
        assert num_kv_heads % tp_size == 0, f"{num_kv_heads} KV heads over {tp_size} tensor-parallel ranks"
        self.head_dim = config.kv_channels
        self.queries_per_group = num_heads // num_kv_heads
        self.num_kv_heads_per_rank = num_kv_heads // tp_size

        column: dict[str, Any] = {"config": config, "init_method": config.init_method, "gather_output": False, "tp_group": self.tp_group}
        # Rows are grouped by KV head, [q ... q k v | q ... q k v | ...]: a slice over TP ranks is a slice of heads, at any TP size.
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            (num_heads + 2 * num_kv_heads) * self.head_dim,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **column,
        )
        # Apart from linear_qkv, although sequence parallelism gathers the input once for each: converted models then keep the qkv
        # weight of their origin, and the gate of a full layer can be left out of weight decay.
        self.linear_gate = build_module(
            submodules.linear_gate,
            config.hidden_size,
            num_kv_heads * options.num_slots,
            bias=False,
            skip_bias_add=False,
            tp_comm_buffer_name="gate",
            **column,
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            num_heads * self.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )
        eps = config.layernorm_epsilon
        self.q_layernorm = HeadRMSNorm(config, self.head_dim, eps, self.tp_group) if options.qk_norm == "rms" else None
        self.k_layernorm = HeadRMSNorm(config, self.head_dim, eps, self.tp_group) if options.qk_norm == "rms" else None
        self.output_norm = HeadsRMSNorm(config, num_heads * self.head_dim, eps, self.tp_group) if options.output_norm == "rms" else None

        # Set to True, the next forward leaves attention_statistics of its batch (scalars on the device: slot_share, mean_decay,
        # write_strength) in `statistics` and sets it back. Under context parallelism all ranks of the group must set it.
        self.record_statistics = False
        self.statistics: dict[str, Tensor] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Documents | None = None,
        inference_context: Any = None,
        **_: Any,  # rotary tensors and offsets of Megatron's own position embeddings, which this layer does not use
    ) -> tuple[Tensor, None]:
        """[s, b, h] -> ([s, b, h], None), both s / tp under sequence parallelism. Causal; `attention_mask` is not read."""
        assert inference_context is None, "generation runs in the exported Hugging Face model, not through Megatron's inference"
        qkv, _ = self.linear_qkv(hidden_states)
        z, _ = self.linear_gate(hidden_states)
        q, k, v = self._split_heads(qkv)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.options.value_activation == "silu":
            v = F.silu(v)
        g = F.logsigmoid(z.float()) / self.options.tau
        g = g.unflatten(-1, (self.num_kv_heads_per_rank, self.options.num_slots))

        s, b = q.shape[:2]
        q, k, v, g = (x.transpose(0, 1) for x in (q, k, v, g))  # the operator wants [batch, tokens, ...]
        if self.record_statistics:
            self.record_statistics = False
            self.statistics = self._measure(q, k, v, g, packed_seq_params)
        if self.recompute and torch.is_grad_enabled():
            # The operator draws no random numbers, so no generator state is kept. The exchange runs again in the backward, on all
            # ranks in the same order.
            out = torch.utils.checkpoint.checkpoint(
                self._operator, q, k, v, g, packed_seq_params, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = self._operator(q, k, v, g, packed_seq_params)
        out = out.reshape(b, s, -1).transpose(0, 1)
        if self.output_norm is not None:
            out = self.output_norm(F.silu(out))
        return self.linear_proj(out.contiguous())

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = qkv.unflatten(-1, (self.num_kv_heads_per_rank, self.queries_per_group + 2, self.head_dim))
        q, k, v = grouped.split([self.queries_per_group, 1, 1], dim=-2)
        return q.flatten(-3, -2), k.squeeze(-2), v.squeeze(-2)

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, documents: Documents | None) -> Tensor:
        over_ranks = context_parallel_attention if self.options.window is not None else full_attention_over_ranks
        return self._call(hybrid_attention, over_ranks, q, k, v, g, documents)

    @torch.no_grad()
    def _measure(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, documents: Documents | None) -> dict[str, Tensor]:
        over_ranks = context_parallel_statistics if self.options.window is not None else full_attention_statistics
        return self._call(attention_statistics, over_ranks, q, k, v, g, documents)

    def _call(self, on_one_rank: Any, over_ranks: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, documents: Documents | None) -> Any:
        """One of two functions that compute the same: on whole rows, or on the shards of the context-parallel ranks."""
        options = self._attention_options = self._attention_options.to(q.device)
        if self.cp_group.size() > 1:
            exchange = {"exchange": self.exchange} if options.window is None else {}
            boundaries = None if documents is None else documents.boundaries
            return over_ranks(q, k, v, g, options, group=self.cp_group, cu_seqlens=boundaries, **exchange)
        if documents is None:
            return on_one_rank(q, k, v, g, options)
        rows = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v, g))  # documents of all rows lie one after another
        return on_one_rank(*rows, options, cu_seqlens=documents.cu_seqlens)


def attention_spec(options: NHAOptions, **arguments: Any) -> ModuleSpec:
    """Native Hybrid Attention with Megatron's parallel linear layers; `arguments` as `NativeHybridAttention`."""
    return ModuleSpec(
        module=NativeHybridAttention,
        params={"options": options, **arguments},
        submodules=NativeHybridAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, linear_gate=ColumnParallelLinear, linear_proj=RowParallelLinear
        ),
    )
