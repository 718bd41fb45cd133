"""Arithmetic on a model configuration: parameters, FLOPs, bytes of state, bytes sent.

Letters: HQ query heads, H KV heads, D head_dim (keys and values), M slots, W window, S sequence length.
"""

from typing import TYPE_CHECKING

from nha_megatron.config.errors import ConfigError

if TYPE_CHECKING:
    from nha_megatron.config.model import ModelConfig

STATE_BYTES = 4  # slots, log-decays and log-gates are kept in fp32 whatever the precision of the activations
LENGTH_BYTES = 8

# What context ranks may send beyond need to save a message: a further collective takes about 12 us, in which NVLink moves so much.
PACKED_WASTE_BYTES = 4 * 2**20

# fp32 logits that the loss holds at once. Large enough that the products of a chunk keep a GPU busy and that adding the chunk's part to
# the gradient of the output matrix is a small part of the work; small beside the rest of a rank's memory, whatever the sequence length.
LOGITS_BYTES = 256 * 2**20


def attention_parameters(model: "ModelConfig") -> int:
    """Weights of one attention layer: fused qkv, gate, output projection, and the norms that are on."""
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    count = model.hidden_size * (query + 2 * key_value)  # q, k, v
    count += model.hidden_size * model.num_kv_heads * model.num_slots  # gate, no bias
    count += query * model.hidden_size  # output projection, no bias
    if model.qkv_bias:
        count += query + 2 * key_value
    if model.qk_norm == "rms":
        count += 2 * model.head_dim
    if model.output_norm == "rms":
        count += query
    return count


def layer_parameters(model: "ModelConfig") -> int:
    """Weights of one block: attention, SwiGLU (gate, up, down; no biases) and the two RMSNorms before them."""
    return attention_parameters(model) + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size


def embedding_parameters(model: "ModelConfig") -> int:
    """Weights of the embedding and output matrices, padding included."""
    return model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)


def num_parameters(model: "ModelConfig", embeddings: bool = True) -> int:
    """Weights of the model: blocks, final RMSNorm and, unless told otherwise, the embedding and output matrices."""
    count = model.num_layers * layer_parameters(model) + model.hidden_size
    return count + embedding_parameters(model) if embeddings else count


def mean_visible_tokens(window: int | None, sequence_length: int) -> float:
    """Tokens that a query sees exactly, averaged over a sequence: min(t + 1, W) over t = 0 .. S-1; causal attention for None."""
    width = sequence_length if window is None else min(window, sequence_length)
    return width - width * (width - 1) / (2 * sequence_length)


def attention_flops(model: "ModelConfig", window: int | None, sequence_length: int) -> float:
    """Forward FLOPs a token of slots and window in one layer, projections excluded: 2 (K + V) (HQ (M + W) + H M).

    W is the mean fill of the window over the sequence. A `full` layer neither reads nor writes slots.
    """
    rows = model.num_heads * mean_visible_tokens(window, sequence_length)
    if window is not None:
        rows += (model.num_heads + model.num_kv_heads) * model.num_slots
    return 2 * (2 * model.head_dim) * rows


def flops_per_token(model: "ModelConfig", sequence_length: int) -> float:
    """Model FLOPs a token, forward and backward.

    Every product of the forward has two in the backward, hence a factor 3. What an implementation computes again (attention
    probabilities, chunk states, recomputed layers) is not counted: the count stands for the model, so utilisation compares across kernels.
    """
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = model.hidden_size * (2 * query + 2 * key_value + model.num_kv_heads * model.num_slots + 3 * model.ffn_hidden_size)
    matrices = model.num_layers * weights + model.padded_vocab_size * model.hidden_size
    attention = sum(attention_flops(model, window, sequence_length) for window in model.windows)
    return 3.0 * (2 * matrices + attention)


def state_bytes(model: "ModelConfig", length: int | None = None, element_bytes: int = 2) -> int:
    """Bytes that all layers remember of one sequence of `length` tokens (None: longer than every window).

    What `nha_kernels.Memory` holds: M slots and the log-decay of each in fp32, min(W, length) rows of raw keys, values (`element_bytes`)
    and log-gates (fp32), and the length (int64). A `full` layer keeps the rows of all tokens.

    Raises `ConfigError` when a layer is `full` and no length is given.
    """
    heads, slots, dim = model.num_kv_heads, model.num_slots, model.head_dim
    total = 0
    for window in model.windows:
        if window is None and length is None:
            raise ConfigError("a `full` layer remembers every token: give the length of the sequence to count the bytes of its state")
        rows = min(bound for bound in (window, length) if bound is not None)
        total += STATE_BYTES * heads * slots * (2 * dim + 1)
        total += rows * heads * (2 * dim * element_bytes + slots * STATE_BYTES) + LENGTH_BYTES
    return total


def context_parallel_pieces(window: int, shard_length: int, ranks: int) -> int:
    """Slot summaries that each of several context ranks announces in one layer: 0, 1 or 2.

    With f, m = divmod(W, L) the slots of rank r hold the first L - m tokens of shard r - 1 - f and everything before. So the first
    L - m tokens of a shard are announced when rank 1 + f exists, its last m tokens, if any, when rank 2 + f exists.
    """
    whole, shifted = divmod(window, shard_length)
    return int(ranks >= 2 + whole) + int(shifted > 0 and ranks >= 3 + whole)


def context_parallel_bytes(
    model: "ModelConfig",
    window: int,
    shard_length: int,
    ranks: int,
    *,
    tensor: int = 1,
    micro_batch_size: int = 1,
    element_bytes: int = 2,
) -> int:
    """Bytes that an inner context rank hands out in the forward of one layer, whatever the length of the context.

    Halo: raw keys, values (`element_bytes`) and log-gates (fp32) of W tokens. Slot summary: log-decay and updates of the slots in fp32,
    gathered by all ranks. The backward returns the halo's gradient and gathers the gradient of one set of slots.
    """
    if ranks == 1:
        return 0
    heads, slots, dim = model.num_kv_heads // tensor, model.num_slots, model.head_dim
    halo = window * heads * (2 * dim * element_bytes + slots * STATE_BYTES)
    summary = heads * slots * (2 * dim + 1) * STATE_BYTES
    return micro_batch_size * (halo + context_parallel_pieces(window, shard_length, ranks) * summary)


def packs_halo(halo_bytes: int, window: int, shard_length: int, ranks: int) -> bool:
    """Whether the halo of a layer travels with the slot summaries in one all-gather, although only the next rank reads it.

    halo_bytes: of W tokens. One message is faster while what is sent beyond need takes less than a further collective.
    """
    return window <= shard_length and (ranks - 2) * halo_bytes <= PACKED_WASTE_BYTES


def logit_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits over `vocabulary` columns (of one tensor rank) the loss holds at once: a multiple of 128, for full tiles."""
    return max(1, LOGITS_BYTES // (4 * vocabulary * 128)) * 128
