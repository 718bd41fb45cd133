"""Section `profiler`: traces of chosen steps."""

from pydantic import Field

from .base import NonNegative, Positive, Section


class ProfilerConfig(Section):
    """Traces of torch's profiler, for chrome://tracing or Perfetto: `profile/rank_R_steps_A_to_B.json.gz` in logging.directory."""

    start: Positive | None = None
    """First step that is traced, at best one after the slow first ones; null: none is."""
    steps: Positive = 2
    """How many steps are traced; a trace of one step of a large model has tens of megabytes."""
    ranks: list[NonNegative] = Field(default_factory=lambda: [0], min_length=1)
    """Ranks that write a trace each."""
