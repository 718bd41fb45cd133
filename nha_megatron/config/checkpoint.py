"""Section `checkpoint`: when and where a run is saved."""

from typing import Literal

from .base import PathString, Positive, Section


class CheckpointConfig(Section):
    """When and where the run is saved."""

    path: PathString | None = None
    """Directory of the checkpoints; null: `checkpoints` inside logging.directory."""
    every: Positive = 1000
    """Steps between checkpoints; the end of the run is always saved."""
    keep: Positive = 2
    """Newest checkpoints that stay on disk."""
    export_every: Positive | None = None
    """Steps between exports to Hugging Face format, into `exported/step_N` of logging.directory; a multiple of `every`. A process of its
    own on rank 0's host makes them from saved checkpoints, on the CPU, while training goes on. The end is exported too. null: none."""
    asynchronous: bool = False
    """Train on while a checkpoint is written, from a copy of the state in host memory. The last one of a run is waited for in any case."""
    attempts: Positive = 3
    """Saves in a row that must fail to end the run; a failure before is reported, and training goes on. 1: the first failure ends it."""
    resume: Literal[True, False, "fresh"] = True
    """true: continue from the newest complete checkpoint of the directory; begin at step 0 when there is none, and refuse when there are
    some and none can be loaded. fresh: the same, but begin at step 0 instead of refusing; checkpoints that cannot be loaded and
    metrics.jsonl are set aside. false: refuse when there are any."""
    other_data: Literal["refuse", "accept"] = "refuse"
    """A checkpoint whose run read other token files, or in other shares, in the stages that have begun: refuse it, or continue at the same
    position in the new ones. Token files that were moved are not others."""
