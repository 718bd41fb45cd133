"""What the training loop and the checkpoints ask of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from nha_megatron.data import Batch

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


class Engine(Protocol):
    """Owns the model's precision, gradient reduction and optimizer. All methods are collective: every rank calls them."""

    device: torch.device
    model_chunks: list[nn.Module]
    """The model on this rank: one module, or one per virtual pipeline stage."""
    choices: list[str]
    """What the engine chose by itself, and why: lines for the start of a run."""

    def begin_stage(self, config: RunConfig) -> None:
        """Takes over what a stage of the run may change (config/stages.py): sequence length and batch sizes."""

    def train_step(self, batches: Sequence[Batch], lr: float, max_loss: float = math.inf) -> StepResult:
        """Forward, backward and update over this rank's micro batches of one global batch.

        An update whose loss is above `max_loss` is computed and not applied, and neither is one that is not finite, on any rank.
        """

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """(loss sum, counted tokens) over all ranks' micro batches, without gradients."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under names that do not depend on the layout."""

    def finite_weights(self) -> bool:
        """Whether every weight that a checkpoint would hold is finite: the same answer on all ranks."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes full tensors by layout-independent name, and slices what this rank holds. The optimizer starts from them."""

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer for `megatron.core.dist_checkpointing`; resharding is up to it.

        On a CUDA engine, tensors in host memory are made for this call: training does not change them while they are written.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `dist_checkpointing.load` made of `sharded_state_dict(is_loading=True)`."""

    def close(self) -> None:
        """Lets go of what keeps the engine in memory, before another one is made in this process. It cannot be used afterwards."""
