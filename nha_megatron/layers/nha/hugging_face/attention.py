"""Native Hybrid Attention in the modelling file of an exported model. Its cache is a `Memory`.

Shapes: B batch, T new tokens, HQ query heads, H KV heads, K head dimension, M slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nha_megatron.layers.modeling import NHARMSNorm, TokenPlacement

from .attend import attend


class NHAAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        hidden, heads, kv_heads, dim = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(hidden, heads * dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=config.qkv_bias)
        self.g_proj = nn.Linear(hidden, kv_heads * config.num_slots, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)
        if config.qk_norm == "rms":
            self.q_norm = NHARMSNorm(dim, config.rms_norm_eps)
            self.k_norm = NHARMSNorm(dim, config.rms_norm_eps)
        if config.output_norm == "rms":
            self.o_norm = NHARMSNorm(heads * dim, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, rope: tuple[Tensor, float], placement: TokenPlacement, cache: Any | None) -> Tensor:
        config = self.config
        q, k, v = (projection(hidden_states).unflatten(-1, (-1, config.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        z = self.g_proj(hidden_states).unflatten(-1, (-1, config.num_slots))
        g = F.logsigmoid(z.to(torch.promote_types(z.dtype, torch.float32))) / config.tau
        if config.qk_norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.value_activation == "silu":
            v = F.silu(v)
        out, memory = attend(
            q,
            k,
            v,
            g,
            placement=placement,
            memory=None if cache is None else cache.states[self.layer_idx],
            return_memory=cache is not None,
            window=config.windows[self.layer_idx],
            rope=rope[0],
            rope_attention_factor=rope[1],
            empty_slots=config.empty_slots,
        )
        if cache is not None and memory is not None:
            cache.store(self.layer_idx, memory)
        out = out.flatten(-2)
        if config.output_norm == "rms":
            out = self.o_norm(F.silu(out))
        return self.o_proj(out)
