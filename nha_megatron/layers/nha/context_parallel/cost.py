"""What the exchange of slots and window hands out, in bytes. Without torch."""

from __future__ import annotations

from nha_megatron.layers.kind import ModelShape, RankShape

STATE_BYTES = 4  # slots, log-decays and log-gates are kept in fp32 whatever the precision of the activations

# What context ranks may send beyond need to save a message: a further collective takes about 12 us, in which NVLink moves so much.
PACKED_WASTE_BYTES = 4 * 2**20


def context_parallel_pieces(window: int, shard_length: int, ranks: int) -> int:
    """Slot summaries that each of several context ranks announces in one layer: 0, 1 or 2.

    With f, m = divmod(W, L) the slots of rank r hold the first L - m tokens of shard r - 1 - f and everything before. So the first
    L - m tokens of a shard are announced when rank 1 + f exists, its last m tokens, if any, when rank 2 + f exists.
    """
    whole, shifted = divmod(window, shard_length)
    return int(ranks >= 2 + whole) + int(shifted > 0 and ranks >= 3 + whole)


def halo_bytes(model: ModelShape, num_slots: int, window: int, rank: RankShape) -> int:
    """Raw keys, values (`element_bytes`) and log-gates (fp32) of W tokens."""
    heads = model.num_kv_heads // rank.tensor
    return rank.micro_batch_size * window * heads * (2 * model.head_dim * rank.element_bytes + num_slots * STATE_BYTES)


def summary_bytes(model: ModelShape, num_slots: int, rank: RankShape) -> int:
    """Log-decay and updates of the slots in fp32: one piece."""
    heads = model.num_kv_heads // rank.tensor
    return rank.micro_batch_size * heads * num_slots * (2 * model.head_dim + 1) * STATE_BYTES


def context_parallel_bytes(model: ModelShape, num_slots: int, window: int, rank: RankShape) -> int:
    """Bytes that an inner context rank hands out in the forward of one layer, whatever the length of the context.

    Halo, and the slot summaries that all ranks gather. The backward returns the halo's gradient and gathers that of one set of slots.
    """
    if rank.context == 1:
        return 0
    pieces = context_parallel_pieces(window, rank.shard_length, rank.context)
    return halo_bytes(model, num_slots, window, rank) + pieces * summary_bytes(model, num_slots, rank)


def packs_halo(halo_bytes: int, window: int, shard_length: int, ranks: int) -> bool:
    """Whether the halo of a layer travels with the slot summaries in one all-gather, although only the next rank reads it.

    halo_bytes: of W tokens. One message is faster while what is sent beyond need takes less than a further collective.
    """
    return window <= shard_length and (ranks - 2) * halo_bytes <= PACKED_WASTE_BYTES
