"""What one attention layer costs over context ranks, forward and backward, from measured times of one rank and a network.

    NHA layer over R ranks with L tokens each =
        operator(L)                                   as on one rank
      + summary of the writes of the announced pieces measured, linear in L (gates that forget; a pass over the log-gates, little else)
      + copies of keys, values and log-gates          bytes / copy rate, linear in L: they are laid behind the memory
      + composing the gathered pieces                 bytes / copy rate, linear in R
      + small kernels                                 a fixed number: messages packed and unpacked, the operator told where memory is
      + message of the backward                       network, linear in R for a ring
      + message of the forward, as far as it takes longer than the copies, which run meanwhile

The host is taken to be ahead of the device. One sequence, unpacked, no tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nha_megatron.hardware.measured import MeasuredTimes
from nha_megatron.hardware.network import Gather, Network, require_positive
from nha_megatron.layers.kind import ConfigError, RankShape
from nha_megatron.layers.nha.config import NHAFields
from nha_megatron.layers.nha.context_parallel.cost import STATE_BYTES, context_parallel_pieces, halo_bytes, packs_halo, summary_bytes


@dataclass(frozen=True)
class LayerRates:
    """Forward and backward of one rank, measured.

    Attributes:
        operator: `nha_attention` on a shard.
        summary: `slot_summary` of a run of tokens.
        copy_tb_per_s: bytes read and written a second by a large copy, in 1e12.
        small_kernels_ms: all kernels of a layer whose time does not depend on its sizes, forward and backward.
    """

    operator: MeasuredTimes
    summary: MeasuredTimes
    copy_tb_per_s: float
    small_kernels_ms: float

    def __post_init__(self) -> None:
        require_positive("copy rate in TB/s", self.copy_tb_per_s)
        require_positive("time of the small kernels in ms", self.small_kernels_ms)

    def pass_ms(self, num_bytes: float) -> float:
        return num_bytes / self.copy_tb_per_s * 1e-9


@dataclass(frozen=True)
class LayerCost:
    """Milliseconds of one layer, forward and backward, on the slowest rank."""

    operator: float
    summary: float
    copies: float
    composition: float
    small_kernels: float
    network: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def efficiency(self) -> float:
        """Of weak scaling: the operator on one rank over the layer on all."""
        return self.operator / self.total


def nha_layer_cost(
    model: NHAFields,
    window: int,
    shard_length: int,
    ranks: int,
    rates: LayerRates,
    network: Network,
    *,
    gather: Gather = "ring",
    element_bytes: int = 2,
) -> LayerCost:
    """Cost of a layer with slots and window.

    Raises:
        ConfigError: no tokens or ranks, or a window that is wider than a shard (its halo comes from several ranks, which is not modelled).
    """
    check_shards(shard_length, ranks)
    if not 0 <= window <= shard_length:
        raise ConfigError(f"window {window} with {shard_length} tokens a rank: the cost is modelled for windows from 0 to a shard")
    operator = rates.operator.at(shard_length)
    if ranks == 1:
        return LayerCost(operator, 0.0, 0.0, 0.0, 0.0, 0.0)

    pieces = context_parallel_pieces(window, shard_length, ranks)
    rank = RankShape(context=ranks, sequence_length=ranks * shard_length, element_bytes=element_bytes)
    one_piece = summary_bytes(model, model.num_slots, rank)
    halo = halo_bytes(model, model.num_slots, window, rank)
    shifted = window % shard_length
    lengths = (shard_length - shifted, shifted)[:pieces]
    if packs_halo(halo, window, shard_length, ranks):
        forward = network.all_gather_ms(pieces * one_piece + halo, ranks, gather)
        backward = network.all_gather_ms(one_piece + halo, ranks, gather)
    else:
        forward = network.neighbour_ms(halo, ranks) + network.all_gather_ms(pieces * one_piece, ranks, gather)
        backward = network.neighbour_ms(halo, ranks) + network.all_gather_ms(one_piece, ranks, gather)
    copies = rates.pass_ms(shard_length * copied_bytes(model, element_bytes))
    return LayerCost(
        operator=operator,
        summary=sum(rates.summary.at(tokens) for tokens in lengths),
        copies=copies,
        composition=rates.pass_ms(composition_bytes(one_piece, pieces, ranks)),
        small_kernels=rates.small_kernels_ms,
        network=max(forward - copies, 0.0) + backward,
    )


def copied_bytes(model: NHAFields, element_bytes: int = 2) -> int:
    """Bytes a token that are read and written to lay keys, values and log-gates behind the memory."""
    return 2 * model.num_kv_heads * (2 * model.head_dim * element_bytes + model.num_slots * STATE_BYTES)


def composition_bytes(one_piece: int, pieces: int, ranks: int) -> int:
    """Bytes that the fullest rank reads and writes to compose gathered pieces, in `layers/nha/context_parallel/summaries.py`.

    A composition reads its terms, writes them decayed and reads those to add them up: three passes. Forward: the initial slots and the
    slots before each own piece, of all pieces (the last rank). Backward: each own piece, of all ranks' gradients (the first rank).
    A single piece is used as it arrives.
    """
    if pieces * ranks <= 2:
        return 2 * one_piece
    return 3 * one_piece * ((1 + pieces) * pieces * ranks + pieces * ranks)


def check_shards(shard_length: int, ranks: int) -> None:
    """Raises `ConfigError` unless there are tokens and ranks."""
    if shard_length < 1 or ranks < 1:
        raise ConfigError(f"{ranks} ranks with {shard_length} tokens each: give at least one of both")
