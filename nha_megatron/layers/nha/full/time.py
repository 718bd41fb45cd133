"""What a `full` layer costs over context ranks, from measured times of one rank and a network."""

from __future__ import annotations

from nha_megatron.hardware.measured import MeasuredTimes
from nha_megatron.hardware.network import Network
from nha_megatron.layers.kind import ModelShape, RankShape
from nha_megatron.layers.nha.context_parallel.time import check_shards
from nha_megatron.layers.nha.full.cost import choose_exchange, exchange_bytes


def full_layer_ms(
    model: ModelShape, shard_length: int, ranks: int, operator: MeasuredTimes, network: Network, *, element_bytes: int = 2
) -> float:
    """Milliseconds of a `full` layer, forward and backward, in the exchange that is chosen for its heads: even work and exchange.

    operator: measured for whole sequences on one rank. Beyond the longest the time grows with the square of the length.
    """
    check_shards(shard_length, ranks)
    whole, longest = shard_length * ranks, operator.tokens[-1]
    alone = operator.at(whole) if whole <= longest else operator.milliseconds[-1] * (whole / longest) ** 2
    exchange, _ = choose_exchange("auto", model.num_heads, ranks)
    sent = exchange_bytes(model, exchange, RankShape(context=ranks, sequence_length=whole, element_bytes=element_bytes))
    if exchange == "a2a":  # queries with keys and values, and outputs; the same backward
        return alone / ranks + 2 * network.all_to_all_ms(sent, ranks)
    keys = 2 * model.num_kv_heads * shard_length * model.head_dim * element_bytes
    halves = sent - keys  # second halves of queries and of outputs, to one partner
    keys_ms = network.all_gather_ms(keys, ranks) + network.all_to_all_ms((ranks - 1) * keys, ranks)
    return alone / ranks + keys_ms + 2 * network.neighbour_ms(halves, ranks)
