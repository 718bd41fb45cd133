"""Options of one NHA layer, and what does not fit. NHA's fields stand in section `model` itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from nha_megatron.layers.kind import ModelShape, RankShape
from nha_megatron.layers.nha.full.cost import Exchange, choose_exchange
from nha_megatron.layers.nha.windows import parse_windows


class NHAFields(ModelShape, Protocol):
    """What NHA reads of section `model`."""

    num_slots: int
    window: int | str
    tau: float
    empty_slots: Literal["attend", "mask", "weight"]
    value_activation: Literal["silu", "none"]
    output_norm: Literal["rms", "none"]
    qk_norm: Literal["none", "rms"]


@dataclass(frozen=True)
class NHAOptions:
    """One layer. `config/model.py` says what each field means."""

    window: int | None
    """Tokens seen exactly; None: `full`."""
    num_slots: int
    tau: float
    empty_slots: Literal["attend", "mask", "weight"]
    value_activation: Literal["silu", "none"]
    output_norm: Literal["rms", "none"]
    qk_norm: Literal["none", "rms"]


def read_options(model: NHAFields, argument: str | None, layer: int) -> NHAOptions:
    """`nha:64` and `nha:full` name the window; `nha` alone takes that of `model.window` at this layer."""
    window = parse_windows(model.window, model.num_layers)[layer] if argument is None else parse_windows(argument, 1)[0]
    return NHAOptions(
        window=window,
        num_slots=model.num_slots,
        tau=model.tau,
        empty_slots=model.empty_slots,
        value_activation=model.value_activation,
        output_norm=model.output_norm,
        qk_norm=model.qk_norm,
    )


def full_exchange(o: NHAOptions, model: ModelShape, rank: RankShape) -> tuple[Exchange, str] | None:
    """How a `full` layer is computed over context ranks, and why; None for a window, and where one rank holds whole sequences."""
    if rank.context == 1 or o.window is not None:
        return None
    return choose_exchange(rank.cp_comm_type, model.num_heads // rank.tensor, rank.context)


def layer_problems(o: NHAOptions, model: ModelShape, rank: RankShape) -> Iterator[str]:
    """Heads that do not divide."""
    if model.num_kv_heads % rank.tensor:
        yield (
            f"model.num_kv_heads {model.num_kv_heads} is not a multiple of parallel.tensor {rank.tensor}, which splits it; "
            "change one of them"
        )
    heads = model.num_heads // rank.tensor
    if rank.cp_comm_type == "a2a" and o.window is None and heads % rank.context:
        yield (
            f"parallel.cp_comm_type a2a gives every context rank some heads of a `full` layer, but model.num_heads {model.num_heads} / "
            f"parallel.tensor {rank.tensor} = {heads} is not a multiple of parallel.context {rank.context}; use all_gather or "
            "auto, or change parallel.context"
        )
