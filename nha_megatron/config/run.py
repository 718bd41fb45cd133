"""The whole configuration of a run, and the checks that need more than one section."""

from functools import cached_property
from pathlib import Path

from pydantic import Field, model_validator

from nha_megatron.layers.kind import RankShape

from . import consistency, refusals
from .base import Section
from .checkpoint import CheckpointConfig
from .consistency import rank_shape
from .data import DataConfig
from .errors import ConfigError, problems_message, raise_problems
from .guards import GuardsConfig
from .logging import LoggingConfig
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .profiler import ProfilerConfig
from .stage_plan import Stage, group_into_phases, plan_stages
from .training import TrainingConfig


class RunConfig(Section):
    """Everything a run needs. Made by `load_config` or `parse_config`, which report mistakes as `ConfigError`."""

    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    logging: LoggingConfig
    profiler: ProfilerConfig = Field(default_factory=ProfilerConfig)

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        raise_problems([*consistency.problems(sections), *refusals.problems(sections)])
        _ = self.stages  # a stage that does not fit is refused here
        return self

    @cached_property
    def stages(self) -> tuple["Stage[RunConfig]", ...]:
        """The training stages in their order; a run without `training.stages` is one stage."""
        return plan_stages(self)

    @cached_property
    def phases(self) -> tuple[tuple["Stage[RunConfig]", ...], ...]:
        """The stages, grouped into runs of neighbours that one built model serves: same parallel sizes, same recomputation."""
        return group_into_phases(self.stages)

    def stage_at(self, step: int) -> "Stage[RunConfig]":
        """The stage whose values a run has that has done `step` steps: the one of its last step."""
        return next(stage for stage in self.stages if step <= stage.last_step or stage.last_step == self.training.steps)

    @property
    def checkpoint_directory(self) -> Path:
        """Where checkpoints are written and looked for."""
        return Path(self.checkpoint.path) if self.checkpoint.path is not None else Path(self.logging.directory) / "checkpoints"

    @cached_property
    def rank_shape(self) -> RankShape:
        """One rank's part of a micro batch: what the costs of a layer depend on beside the model."""
        return rank_shape(self.parallel, self.data, self.training)

    @cached_property
    def exchanges(self) -> dict[str, tuple[str, str]]:
        """Layers whose kind chose between exchanges over context ranks, by their label: name of the exchange, and why."""
        chosen = {layer.label: layer.kind.exchange(layer.options, self.model, self.rank_shape) for layer in dict.fromkeys(self.model.stack)}
        return {label: exchange for label, exchange in chosen.items() if exchange is not None}

    def micro_batches(self, world_size: int) -> int:
        """Micro batches that every rank runs in one optimizer step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.check_world(world_size))

    def check_world(self, world_size: int) -> int:
        """Data-parallel size in a world of that many ranks. Raises `ConfigError` when the world does not fit."""
        problems = []
        for stage in self.stages:
            parallel = stage.config.parallel
            found = consistency.world_problems(stage.config.training, parallel, parallel.data(world_size))
            problems += found if stage.number == 1 else [f"training.stages.{stage.number - 2}: {problem}" for problem in found]
        beyond = [rank for rank in self.profiler.ranks if rank >= world_size]
        if self.profiler.start is not None and beyond:
            problems.append(f"profiler.ranks has {beyond[0]}, but ranks are 0 to {world_size - 1}; name some of these")
        if problems:
            raise ConfigError(problems_message(f"world size {world_size}", problems))
        return self.parallel.data(world_size)
