"""What the two engines can and cannot do, as far as the configuration tells."""

from collections.abc import Iterator

from .deepspeed import DeepSpeedConfig, ZeroConfig
from .parallel import ParallelConfig
from .training import TrainingConfig

ZERO_1 = DeepSpeedConfig(zero_optimization=ZeroConfig(stage=1))


def zero_settings(training: TrainingConfig) -> ZeroConfig | None:
    """What ZeRO does in the run: None under the Megatron engine, stage 1 where nothing is said."""
    if training.engine != "deepspeed":
        return None
    return (training.deepspeed or ZERO_1).zero_optimization


def settings_without_engine(training: TrainingConfig) -> Iterator[str]:
    """Refuses settings of DeepSpeed that the run would not use."""
    if training.engine != "deepspeed" and training.deepspeed is not None:
        yield "training.deepspeed is given, but training.engine is megatron; remove it or set training.engine to deepspeed"


def no_pipeline(training: TrainingConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Refuses pipeline parallelism under the DeepSpeed engine."""
    if training.engine == "deepspeed" and parallel.pipeline > 1:
        yield (
            f"training.engine deepspeed with parallel.pipeline {parallel.pipeline}; not supported yet, because the "
            "pipeline schedules are Megatron's: use training.engine megatron, or parallel.pipeline 1 with ZeRO stage 3"
        )


def no_new_model(training: TrainingConfig) -> Iterator[str]:
    """Refuses stages that build the model anew under the DeepSpeed engine."""
    if training.engine == "deepspeed" and any(stage.context or stage.recompute for stage in training.stages or []):
        yield (
            "training.stages with context or recompute under training.engine deepspeed; not supported yet, because they build the model "
            "anew within a run: use training.engine megatron, or change parallel.context between two starts of the run"
        )
