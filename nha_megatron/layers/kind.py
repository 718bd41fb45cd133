"""What the rest of the system asks of a layer kind.

A *kind* is one way to mix tokens: Native Hybrid Attention is one. It is a folder of its own (`layers/nha/`) with one object, a `LayerKind`,
and nobody else knows what is inside: configuration, estimates, model, training and export ask the object. `registry.py` finds it by the
name that stands in `model.layers`; docs/how_to_add_a_layer_kind.md adds one step by step.

    config/     options, section, problems       what is written in YAML, what is refused and why
    estimate/   weights, flops, state_bytes,     sizes and costs, without torch
                kept_bytes, sent_bytes, exchange
    model/      spec, weights                    the Megatron module; how each weight starts, and whether it decays
    training/   statistics, request, collect,    what a layer reports of itself
                modules_without_collectives
    hf/         hugging_face                     how it is written into an exported model; None: the export refuses

Nothing here imports torch, and of the configuration only its base: a kind is asked before torch is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from nha_megatron.config.base import ConfigError, Section

if TYPE_CHECKING:
    import torch

__all__ = ["ConfigError", "LayerKind", "ModelShape", "RankShape", "Section", "Weight", "dense_flops"]


class ModelShape(Protocol):
    """The fields of section `model` that do not belong to one kind."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    norm_eps: float


@dataclass(frozen=True)
class RankShape:
    """One rank's part of a micro batch and of every matrix: what costs in a layer depend on beside the model."""

    sequence_length: int
    """Tokens of a whole sample, over all context ranks."""
    micro_batch_size: int = 1
    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    cp_comm_type: Literal["auto", "a2a", "all_gather"] = "auto"
    isolates_documents: bool = False
    element_bytes: int = 2
    """Of weights and activations: 2 in bf16, 4 in fp32."""

    @property
    def shard_length(self) -> int:
        """Tokens of a sample that a context rank holds."""
        return self.sequence_length // self.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch that a context rank holds."""
        return self.micro_batch_size * self.shard_length


Initial = Literal["normal", "residual", "ones", "zeros"]
Draw = Callable[["tuple[int, ...]", "torch.Generator"], "torch.Tensor"]


@dataclass(frozen=True)
class Weight:
    """One weight of a layer's attention, by its full shape on one rank."""

    name: str
    """Inside the attention module, such as `linear_qkv.weight`."""
    shape: tuple[int, ...]
    initial: Initial | Draw = "normal"
    """normal: normal(0, model.init_std). residual: that, divided by sqrt(2 num_layers), for what writes to the residual stream. Or a
    function of the full shape and a seeded generator, which returns fp32 on the generator's device."""
    decayed: bool = True
    """Whether AdamW's weight decay acts on it. Said for each weight, never guessed from its shape."""
    sharded: bool = True
    """Whether tensor parallelism splits it; else every tensor rank holds it."""

    @property
    def count(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class LayerKind(ABC):
    """One object answers for all layers of a kind. `o` is what `options` returned for a layer: immutable and hashable."""

    name: ClassVar[str]
    """In `model.layers`, and of its section `model.<name>`. Letters, digits and underscores."""
    section: ClassVar[type[Section] | None] = None
    """Fields of `model.<name>`, all with defaults; None where the kind needs none."""

    def __eq__(self, other: object) -> bool:
        """A kind is its class and name: one that comes from another process is the same."""
        return type(self) is type(other) and isinstance(other, LayerKind) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    # Configuration

    @abstractmethod
    def options(self, model: Any, argument: str | None, layer: int) -> Any:
        """Options of layer `layer` (from 0), written `name` or `name:argument` in `model.layers`.

        model: section `model`; the kind's own section is its attribute of the kind's name.

        Raises `ConfigError` for an argument that it does not know, with what is allowed.
        """

    def describe(self, o: Any) -> str:
        """The layer in a report, short: what distinguishes layers of the kind in one stack."""
        return self.name

    def problems(self, o: Any, model: ModelShape, rank: RankShape) -> Iterator[str]:
        """What does not fit or is not supported in this layout: what was given, what is allowed, what to change."""
        yield from ()

    # Sizes and costs

    @abstractmethod
    def weights(self, o: Any, model: ModelShape) -> Sequence[Weight]:
        """Every weight of the attention module."""

    @abstractmethod
    def flops(self, o: Any, model: ModelShape, sequence_length: int) -> float:
        """Forward FLOPs a token of the attention module, its projections included, mean over a sequence (`dense_flops` helps)."""

    @abstractmethod
    def state_bytes(self, o: Any, model: ModelShape, length: int | None, element_bytes: int) -> int:
        """Bytes that a layer remembers of one sequence of `length` tokens (None: longer than any bound).

        Raises `ConfigError` where that has no bound and no length is given.
        """

    @abstractmethod
    def kept_bytes(self, o: Any, model: ModelShape, rank: RankShape, recompute: bool) -> int:
        """Bytes that the attention module of one rank keeps for the backward of one micro batch, but for its input.

        recompute: selective recomputation; what the operator and its exchange would keep is then computed again.
        """

    @abstractmethod
    def sent_bytes(self, o: Any, model: ModelShape, rank: RankShape) -> int:
        """Bytes that an inner context rank hands out in the forward of one micro batch. Asked with several context ranks only."""

    def exchange(self, o: Any, model: ModelShape, rank: RankShape) -> tuple[str, str] | None:
        """Name and reason where the kind chose between exchanges over context ranks; None where it has one."""
        return None

    # Model

    @abstractmethod
    def spec(self, o: Any, model: Any, rank: RankShape, recompute: bool) -> Any:
        """The `ModuleSpec` of the attention module. Megatron builds it with `config`, `layer_number`, `pg_collection` and more.

        Its forward takes hidden states [s, b, h] (s / tp under sequence parallelism) and `packed_seq_params`, a `Documents` or None, and
        returns the same shape and a bias or None. recompute: selective recomputation is asked for.
        """

    # Training

    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that a layer measures of itself on request; they become lists over the layers in metrics.jsonl."""

    def request(self, attention: Any) -> None:
        """Makes the attention module measure itself in its next forward."""
        return None

    def collect(self, attention: Any) -> dict[str, torch.Tensor]:
        """What it measured on its heads and tokens: a scalar for each of `statistics`. Called once after `request` and a forward."""
        return {}

    def modules_without_collectives(self, attention: Any, rank: RankShape) -> Iterator[Any]:
        """The largest parts of the attention module whose forward runs no collective in this layout; their time shows a slow rank.

        Under sequence parallelism every linear layer gathers or scatters: nothing is asked then.
        """
        yield from ()

    # Hugging Face

    @property
    def hugging_face(self) -> Any | None:
        """`layers/hugging_face.py: HuggingFaceLayer`, or None where the kind cannot be exported."""
        return None


def dense_flops(rows: int, columns: int) -> float:
    """Forward FLOPs a token of a matrix: a product and a sum for each weight."""
    return 2.0 * rows * columns
