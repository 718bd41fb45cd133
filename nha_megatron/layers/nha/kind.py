"""Native Hybrid Attention as a layer kind: what the system asks of it, answered by the files beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nha_megatron.layers.kind import LayerKind, ModelShape, RankShape, Weight
from nha_megatron.layers.nha import cost
from nha_megatron.layers.nha.config import NHAFields, NHAOptions, full_exchange, layer_problems, read_options
from nha_megatron.layers.nha.context_parallel.cost import context_parallel_bytes
from nha_megatron.layers.nha.full.cost import exchange_bytes
from nha_megatron.layers.nha.windows import describe_window

if TYPE_CHECKING:
    import torch


class NativeHybridAttentionKind(LayerKind):
    """Slots and a window under one softmax (arXiv 2510.07019). `nha:64` is a window of 64 tokens, `nha:full` one beyond any length."""

    name = "nha"
    statistics = ("slot_share", "mean_decay", "write_strength")

    def options(self, model: NHAFields, argument: str | None, layer: int) -> NHAOptions:
        return read_options(model, argument, layer)

    def describe(self, o: NHAOptions) -> str:
        return describe_window(o.window)

    def problems(self, o: NHAOptions, model: ModelShape, rank: RankShape) -> Iterator[str]:
        return layer_problems(o, model, rank)

    def weights(self, o: NHAOptions, model: ModelShape) -> Sequence[Weight]:
        return cost.weights(o, model)

    def flops(self, o: NHAOptions, model: ModelShape, sequence_length: int) -> float:
        return cost.flops(o, model, sequence_length)

    def state_bytes(self, o: NHAOptions, model: ModelShape, length: int | None, element_bytes: int) -> int:
        return cost.state_bytes(o, model, length, element_bytes)

    def kept_bytes(self, o: NHAOptions, model: ModelShape, rank: RankShape, recompute: bool) -> int:
        return cost.kept_bytes(o, model, rank, recompute)

    def sent_bytes(self, o: NHAOptions, model: ModelShape, rank: RankShape) -> int:
        if o.window is not None:
            return context_parallel_bytes(model, o.num_slots, o.window, rank)
        exchange = full_exchange(o, model, rank)
        return 0 if exchange is None else exchange_bytes(model, exchange[0], rank)

    def exchange(self, o: NHAOptions, model: ModelShape, rank: RankShape) -> tuple[str, str] | None:
        return full_exchange(o, model, rank)

    def spec(self, o: NHAOptions, model: Any, rank: RankShape, recompute: bool) -> Any:
        from nha_megatron.layers.nha.layer import attention_spec

        exchange = full_exchange(o, model, rank)
        rope, factor = model.rope()
        return attention_spec(
            o, rope=rope, rope_attention_factor=factor, exchange=None if exchange is None else exchange[0], recompute=recompute
        )

    def request(self, attention: Any) -> None:
        attention.record_statistics = True

    def collect(self, attention: Any) -> dict[str, torch.Tensor]:
        measured: dict[str, torch.Tensor] | None = attention.statistics
        assert measured is not None, "`request` comes before the forward"
        attention.statistics = None
        return measured

    def modules_without_collectives(self, attention: Any, rank: RankShape) -> Iterator[Any]:
        if rank.tensor == 1 and rank.context == 1:
            yield attention
        else:
            yield from (attention.linear_qkv, attention.linear_gate)
            if rank.tensor == 1:  # else it sums over the tensor ranks
                yield attention.linear_proj

    @property
    def hugging_face(self) -> Any:
        from nha_megatron.layers.nha.hugging_face import HUGGING_FACE

        return HUGGING_FACE


KIND = NativeHybridAttentionKind()
