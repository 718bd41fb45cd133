"""What the parts of a run are given: the job, the same from its start to its end, and what one built model trains with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nha_megatron.checkpoint import CheckpointSaver
from nha_megatron.config import RunConfig
from nha_megatron.engine.base import Engine
from nha_megatron.engine.layout import Layout
from nha_megatron.training.reporter import Reporter
from nha_megatron.training.stage_data import StageData
from nha_megatron.training.stall import StallWatch


@dataclass(frozen=True)
class Job:
    """A run on this rank, whatever model is built for it."""

    config: RunConfig
    """The whole run; `config.stages` and `config.phases` hold the values of its stages."""
    data: StageData
    identity: dict[str, Any]
    """What the run reads (data/identity.py), kept with its checkpoints."""
    say: Callable[[str], None]
    """Takes a line for the user, on every rank; one rank shows it."""


@dataclass(frozen=True)
class TrainingContext:
    """What the training loop works with while one built model trains."""

    config: RunConfig
    """The whole run."""
    engine: Engine
    data: StageData
    reporter: Reporter | None
    """On the writing rank alone."""
    saver: CheckpointSaver
    watch: StallWatch

    @property
    def layout(self) -> Layout:
        return self.engine.layout
