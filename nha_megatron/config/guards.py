"""Section `guards`: what a run does when its numbers or its machines go wrong."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .base import NonNegative, NonNegativeReal, PositiveReal, Section


class GuardsConfig(Section):
    """Non-finite numbers, loss spikes, slow ranks. The defaults skip a few bad steps, report the rest, and stop a run that is lost."""

    renamed: ClassVar = {"guards.window": "guards.window_steps"}

    window_steps: Annotated[int, Field(ge=8, le=100_000)] = 64
    """Steps that the guards look back: their window."""
    skip_limit: NonNegative = 5
    """Skipped steps allowed in a window. A step whose loss or gradient is not finite on any rank is skipped on all: its data is used
    up, weights and optimizer stay. One more than allowed stops the run with status 3; nothing is saved right after a skipped step.
    0: the first one stops the run."""
    loss_spike: Literal["ignore", "report", "skip", "stop"] = "report"
    """What is done about a loss far above those of the window. skip: the update is not applied, and counts for skip_limit; stop: the
    update is not applied and the run ends with status 3."""
    spike_deviations: PositiveReal = 6.0
    """A loss is a spike when it is above the window's median by more than this many standard deviations (1.4826 times the median
    absolute deviation, which a few outliers do not move). It takes half a window of losses before one is judged."""
    spike_minimum: NonNegativeReal = 0.1
    """And by more than this many nats."""
    slow_rank_ratio: Annotated[float, Field(gt=1)] = 1.5
    """The slowest rank is in metrics.jsonl at every logging interval; the console names it when its own work takes this many times
    the median of the ranks of its pipeline stage."""
