"""Sizes and costs of one NHA layer, without torch.

Letters: HQ query heads, H KV heads, D head_dim (keys and values), M slots, W window, S sequence length.
"""

from __future__ import annotations

from nha_megatron.layers.kind import ConfigError, ModelShape, RankShape, Weight, dense_flops
from nha_megatron.layers.nha.config import NHAOptions, full_exchange
from nha_megatron.layers.nha.context_parallel.cost import STATE_BYTES
from nha_megatron.layers.nha.full.cost import received_bytes

LENGTH_BYTES = 8


def weights(o: NHAOptions, model: ModelShape) -> tuple[Weight, ...]:
    """Fused qkv, gate, output projection, and the norms that are on."""
    hidden, query, key_value = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    found = [
        Weight("linear_qkv.weight", (query + 2 * key_value, hidden)),
        # The gate of a full layer never gets a gradient; decay alone would shrink it, and the window could not be narrowed later.
        Weight("linear_gate.weight", (model.num_kv_heads * o.num_slots, hidden), decayed=o.window is not None),
        Weight("linear_proj.weight", (hidden, query), initial="residual"),
    ]
    if model.qkv_bias:
        found.append(Weight("linear_qkv.bias", (query + 2 * key_value,), initial="zeros", decayed=False))
    if o.qk_norm == "rms":
        names = ("q_layernorm.weight", "k_layernorm.weight")
        found += [Weight(name, (model.head_dim,), initial="ones", decayed=False, sharded=False) for name in names]
    if o.output_norm == "rms":
        found.append(Weight("output_norm.weight", (query,), initial="ones", decayed=False))
    return tuple(found)


def mean_visible_tokens(window: int | None, sequence_length: int) -> float:
    """Tokens that a query sees exactly, averaged over a sequence: min(t + 1, W) over t = 0 .. S-1; causal attention for None."""
    width = sequence_length if window is None else min(window, sequence_length)
    return width - width * (width - 1) / (2 * sequence_length)


def operator_flops(o: NHAOptions, model: ModelShape, sequence_length: int) -> float:
    """Forward FLOPs a token of slots and window, projections excluded: 2 (K + V) (HQ (M + W) + H M).

    W is the mean fill of the window over the sequence. A `full` layer neither reads nor writes slots.
    """
    rows = model.num_heads * mean_visible_tokens(o.window, sequence_length)
    if o.window is not None:
        rows += (model.num_heads + model.num_kv_heads) * o.num_slots
    return 2 * (2 * model.head_dim) * rows


def flops(o: NHAOptions, model: ModelShape, sequence_length: int) -> float:
    """Forward FLOPs a token: projections and operator."""
    matrices = (weight.shape for weight in weights(o, model) if len(weight.shape) == 2)
    return sum(dense_flops(*shape) for shape in matrices) + operator_flops(o, model, sequence_length)


def state_bytes(o: NHAOptions, model: ModelShape, length: int | None, element_bytes: int) -> int:
    """What `nha_kernels.Memory` holds of one sequence of `length` tokens (None: longer than the window).

    M slots and the log-decay of each in fp32, min(W, length) rows of raw keys, values (`element_bytes`) and log-gates (fp32), and the
    length (int64). A `full` layer keeps the rows of all tokens.

    Raises `ConfigError` for a `full` layer without a length.
    """
    if o.window is None and length is None:
        raise ConfigError("a `full` layer remembers every token: give the length of the sequence to count the bytes of its state")
    heads, slots, dim = model.num_kv_heads, o.num_slots, model.head_dim
    rows = min(bound for bound in (o.window, length) if bound is not None)
    return STATE_BYTES * heads * slots * (2 * dim + 1) + rows * heads * (2 * dim * element_bytes + slots * STATE_BYTES) + LENGTH_BYTES


def kept_bytes(o: NHAOptions, model: ModelShape, rank: RankShape, recompute: bool) -> int:
    """Inputs, output and log-sum-exp of the operator, what norms and activations around it keep, what a `full` layer's exchange brought.

    A fused operator is assumed, so that selective recomputation saves little; the `torch` backend keeps more, which it then saves.
    """
    element = rank.element_bytes
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    gates = model.num_kv_heads * o.num_slots
    sharded = (query + 2 * key_value) * element + 2 * gates * STATE_BYTES  # q, k, v; gate logits and log-gates
    sharded += query * element  # output of the operator
    if o.qk_norm == "rms":
        sharded += (query + key_value) * element
    if o.value_activation == "silu":
        sharded += (query + 2 * key_value) * element  # its input is a part of the projections' output, which is kept whole
    if o.output_norm == "rms":
        sharded += 2 * query * element  # SiLU of the output, and its norm
    if not recompute:
        sharded += model.num_heads * 4  # log-sum-exp
    exchange = full_exchange(o, model, rank)
    received = 0 if recompute or exchange is None else received_bytes(model, exchange[0], rank)
    return rank.tokens * sharded // rank.tensor + received
