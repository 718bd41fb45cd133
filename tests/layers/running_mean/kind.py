"""The kind: what the system asks, answered by the files beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nha_megatron.layers.kind import LayerKind, ModelShape, RankShape, Weight
from nha_megatron.layers.registry import register_kind
from tests.layers.running_mean import cost
from tests.layers.running_mean.config import RunningMeanOptions, RunningMeanSection, read_options


class RunningMeanKind(LayerKind):
    """An elementwise gated running mean."""

    name = "running_mean"
    section = RunningMeanSection
    statistics = ("mean_forget",)

    def options(self, model: Any, argument: str | None, layer: int) -> RunningMeanOptions:
        return read_options(model, argument)

    def describe(self, o: RunningMeanOptions) -> str:
        return f"running_mean:{o.width}"

    def problems(self, o: RunningMeanOptions, model: ModelShape, rank: RankShape) -> Iterator[str]:
        if o.width % rank.tensor:
            yield (f"model.running_mean.width {o.width} is not a multiple of parallel.tensor {rank.tensor}, which splits it; change one")

    def weights(self, o: RunningMeanOptions, model: ModelShape) -> Sequence[Weight]:
        return cost.weights(o, model)

    def flops(self, o: RunningMeanOptions, model: ModelShape, sequence_length: int) -> float:
        return cost.flops(o, model)

    def state_bytes(self, o: RunningMeanOptions, model: ModelShape, length: int | None, element_bytes: int) -> int:
        return cost.state_bytes(o)

    def kept_bytes(self, o: RunningMeanOptions, model: ModelShape, rank: RankShape, recompute: bool) -> int:
        return cost.kept_bytes(o, rank)

    def sent_bytes(self, o: RunningMeanOptions, model: ModelShape, rank: RankShape) -> int:
        return cost.sent_bytes(o, rank)

    def spec(self, o: RunningMeanOptions, model: Any, rank: RankShape, recompute: bool) -> Any:
        from tests.layers.running_mean.layer import attention_spec

        return attention_spec(o)

    def request(self, attention: Any) -> None:
        attention.record_statistics = True

    def collect(self, attention: Any) -> dict[str, Any]:
        measured: dict[str, Any] = attention.statistics
        attention.statistics = None
        return measured

    def modules_without_collectives(self, attention: Any, rank: RankShape) -> Iterator[Any]:
        yield from (attention.linear_value, attention.linear_forget)


KIND = RunningMeanKind()
register_kind(KIND)
