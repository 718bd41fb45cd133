"""Section `optimizer`: AdamW and the learning rate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import NonNegative, NonNegativeReal, Pair, Positive, PositiveReal, Section
from .errors import raise_problems

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule."""

    lr: PositiveReal
    """Highest learning rate."""
    min_lr: NonNegativeReal = 0.0
    """Learning rate at the end of a decay."""
    betas: Pair[Beta] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveReal = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeReal = 0.1
    """Decoupled decay of matrices; norms and biases are not decayed."""
    clip_grad: NonNegativeReal = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to min_lr, constant then a final decay (wsd), or constant."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Positive | None = None
    """wsd only: steps of the final decay."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        problems = []
        if self.min_lr > self.lr:
            problems.append(f"min_lr {self.min_lr} is greater than lr {self.lr}; lower min_lr")
        if self.schedule == "constant" and self.min_lr > 0:
            problems.append(f"min_lr {self.min_lr} is given, but schedule constant never decays; remove it or use cosine or wsd")
        if self.schedule == "wsd" and self.decay_steps is None:
            problems.append("schedule wsd needs decay_steps, the length of the final decay in steps")
        if self.schedule != "wsd" and self.decay_steps is not None:
            problems.append(f"decay_steps is given, but only schedule wsd reads it, and schedule is {self.schedule}; remove it or use wsd")
        raise_problems(problems)
        return self
