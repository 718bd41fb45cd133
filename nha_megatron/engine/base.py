"""What the training loop and the checkpoints ask of an engine, and what all engines do alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nha_megatron.config import ConfigError
from nha_megatron.data import Batch
from nha_megatron.engine.finite import finite_on_all_ranks
from nha_megatron.engine.layout import Layout
from nha_megatron.model.parameters import full_shape, shard_of

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Mean over the counted tokens of the global batch, before the update. Natural logarithm."""
    tokens: int
    """Counted tokens of the global batch."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping; NaN when any rank's gradient is not finite."""
    skipped: bool
    """The loss or the gradient was not finite, or the loss above the limit: weights and optimizer state are unchanged."""


class Engine(ABC):
    """Owns the model's precision, gradient reduction and optimizer. All methods are collective: every rank calls them."""

    model_chunks: list[nn.Module]
    """The model on this rank: one module, or one for each virtual pipeline stage."""
    optimizer: Any
    """Has `param_groups`, as torch's optimizers have."""

    modules_gather_weights = False
    """Whether modules run collectives of the engine's before they compute, to put their weights together."""
    leaves_groups_alone = False
    """Whether the process groups stay as they are when the process ends, because destroying them after this engine is not safe."""

    def __init__(self, config: RunConfig, device: torch.device, layout: Layout) -> None:
        self.config = config
        self.device = device
        self.layout = layout
        self.choices: list[str] = []
        """What the engine is and chose by itself, and why: lines for the start of a run."""

    def begin_stage(self, config: RunConfig) -> None:
        """Takes over what a stage of the run may change (config/stages.py): sequence length and batch sizes. Nothing is built anew."""
        self.config = config

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], lr: float, max_loss: float = math.inf) -> StepResult:
        """Forward, backward and update over this rank's micro batches of one global batch.

        An update whose loss is above `max_loss` is computed and not applied, and neither is one that is not finite, on any rank.
        """

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(loss sum, counted tokens) over all ranks' micro batches, without gradients."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under names that do not depend on the layout (layer numbers over the whole model)."""

    def finite_weights(self) -> bool:
        """Whether every weight that a checkpoint would hold is finite: the same answer on all ranks."""
        return finite_on_all_ranks(self._weights_to_save(), self.device, self.layout.world)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes full tensors by layout-independent name, and slices what this rank holds. The optimizer starts from them.

        Raises ConfigError if a tensor is missing or has another shape.
        """
        for name, parameter in self._shaped_parameters():
            if name not in weights:
                raise ConfigError(f"the weights to start from have no tensor {name!r}; they belong to another model shape")
            shape = full_shape(parameter, self.layout.tp_size)
            if tuple(weights[name].shape) != shape:
                raise ConfigError(f"tensor {name!r} to start from is {tuple(weights[name].shape)}, the configuration makes it {shape}")
            self._take_weight(name, parameter, shard_of(weights[name], parameter, self.layout.tp_rank, self.layout.tp_size))

    @abstractmethod
    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer for `megatron.core.dist_checkpointing`; resharding is up to it.

        `model0`, `model1`, ... (one for each chunk) and `optimizer` (engine/optimizer_state.py), whichever the engine. On a CUDA engine,
        tensors in host memory are made for this call: training does not change them while they are written.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `dist_checkpointing.load` made of `sharded_state_dict(is_loading=True)`, whatever layout and engine wrote it."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what keeps the engine in memory, before another one is made in this process. It cannot be used afterwards."""

    def _weights_to_save(self) -> Iterable[Tensor]:
        """This rank's share of the weights that a checkpoint would hold, one after the other. Iterating is collective."""
        return (parameter for _, parameter in self.named_parameters())

    def _shaped_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As `named_parameters`, with shapes and marks of tensor parallelism, which an engine may have taken from the parameters."""
        return self.named_parameters()

    @abstractmethod
    def _take_weight(self, name: str, parameter: nn.Parameter, shard: Tensor) -> None:
        """Sets the weight `name`, one of `_shaped_parameters`, to `shard`. Called without gradients."""

    @staticmethod
    def _require_counted(tokens: int) -> None:
        """Raises ConfigError when the global batch has no loss."""
        if tokens == 0:
            raise ConfigError("the global batch has no token that counts: every label is masked. Check the data and its loss masks.")

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
