"""The whole configuration of a run, and the checks that need more than one section."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from . import consistency, refusals
from .base import NonNegative, NonNegativeReal, Pair, PathString, Positive, PositiveReal, Section
from .data import DataConfig
from .deepspeed import DeepSpeedSettings
from .errors import ConfigError, problems_message, raise_problems
from .full_layers import Exchange, choose_exchange
from .guards import GuardsConfig
from .model import ModelConfig
from .parallel import ParallelConfig
from .stage_plan import plan_stages, stage_problems
from .stages import StageConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Section):
    """The loop: how long, in what batches, in what precision, on what."""

    steps: Positive
    """Optimizer steps of the whole run, over all stages."""
    micro_batch_size: Positive
    """Samples that one rank runs through the model at once."""
    global_batch_size: Positive
    """Samples of one optimizer step, over all ranks."""
    stages: Annotated[list[StageConfig], Field(min_length=1)] | None = None
    """Changes of context length, batch size, data or schedule during the run, each from a token offset on; null: none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; gradients, optimizer state, softmax and slots are fp32 in both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping: nothing, the attention operator, or whole layers."""
    recompute_layers: Positive | None = None
    """With recompute full: how many layers are recomputed, the first ones of every pipeline stage (of every model chunk when interleaved);
    null: all. The others keep what their backward needs."""
    gradient_accumulation_fusion: Literal["auto", True, False] = "auto"
    """Add weight gradients to the fp32 gradient inside the matrix product: on CUDA, with an extension of NVIDIA Apex. auto: where it is
    installed."""
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """Who owns the optimizer, gradient reduction and precision."""
    deepspeed: DeepSpeedSettings | None = None
    """For engine deepspeed: DeepSpeed's `zero_optimization`, or the path of a JSON file that holds it; null: ZeRO stage 1."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    seed: NonNegative = 0
    """Seed of the initial weights."""
    stall_seconds: Positive = 600
    """Longest time that one phase of a step (data, update, validation, checkpoint) may take: a run that stands still longer ends, and
    the rank that it waits for is named."""
    validate_every: Positive | None = None
    """Steps between validations; null: never."""
    validate_batches: Positive = 8
    """Global batches of one validation."""


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


class CheckpointConfig(Section):
    """When and where the run is saved."""

    path: PathString | None = None
    """Directory of the checkpoints; null: `checkpoints` inside logging.directory."""
    every: Positive = 1000
    """Steps between checkpoints; the end of the run is always saved."""
    keep: Positive = 2
    """Newest checkpoints that stay on disk."""
    asynchronous: bool = False
    """Train on while a checkpoint is written, from a copy of the state in host memory. The last one of a run is waited for in any case."""
    attempts: Positive = 3
    """Saves in a row that must fail to end the run; a failure before is reported, and training goes on. 1: the first failure ends it."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the directory when there is one."""
    other_data: Literal["refuse", "accept"] = "refuse"
    """A checkpoint whose run read other token files, or in other shares, in the stages that have begun: refuse it, or continue at the same
    position in the new ones. Token files that were moved are not others."""


class LoggingConfig(Section):
    """What the run writes about itself."""

    directory: PathString
    """Folder of the run."""
    every: Positive = 1
    """Steps between lines on the console, in TensorBoard and in wandb; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb: bool = False
    """Report to Weights & Biases."""
    layer_statistics: Positive | None = None
    """Steps between records of slot share, decay and write strength of every layer; null: never."""


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

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        raise_problems([*consistency.problems(sections), *refusals.problems(sections)] or stage_problems(self))
        return self

    @property
    def checkpoint_directory(self) -> Path:
        """Where checkpoints are written and looked for."""
        return Path(self.checkpoint.path) if self.checkpoint.path is not None else Path(self.logging.directory) / "checkpoints"

    @property
    def full_layer_exchange(self) -> tuple[Exchange, str] | None:
        """How `full` layers are computed over context ranks, and why; None when there are none or one rank holds whole sequences."""
        if self.parallel.context == 1 or None not in self.model.windows:
            return None
        return choose_exchange(self.parallel.cp_comm_type, self.model.num_heads // self.parallel.tensor, self.parallel.context)

    def micro_batches(self, world_size: int) -> int:
        """Micro batches that every rank runs in one optimizer step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.check_world(world_size))

    def check_world(self, world_size: int) -> int:
        """Data-parallel size in a world of that many ranks. Raises `ConfigError` when the world does not fit."""
        problems = []
        for stage in plan_stages(self):
            parallel = stage.config.parallel
            found = consistency.world_problems(stage.config.training, parallel, parallel.data(world_size))
            problems += found if stage.number == 1 else [f"training.stages.{stage.number - 2}: {problem}" for problem in found]
        if problems:
            raise ConfigError(problems_message(f"world size {world_size}", problems))
        return self.parallel.data(world_size)
