"""Checks that need more than one section: sizes that must divide each other, and steps that must fit the run.

Each check is a function whose parameters are named after the sections it reads; it runs when these sections are valid, so that one
message can list every problem of a file.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nha_megatron.layers.kind import RankShape

from .checkpoint import CheckpointConfig
from .data import DataConfig
from .engines import settings_without_engine
from .gradient_fusion import fusion_problems
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .parallel import ParallelConfig
from .training import TrainingConfig

Check = Callable[..., Iterator[str]]


def run_checks(checks: Sequence[Check], sections: Mapping[str, Any]) -> list[str]:
    """Messages of all checks whose sections are there."""
    messages: list[str] = []
    for check in checks:
        names = list(inspect.signature(check).parameters)
        if all(name in sections for name in names):
            messages += check(*(sections[name] for name in names))
    return messages


def problems(sections: Mapping[str, Any]) -> list[str]:
    """Everything that does not fit together among the valid sections."""
    return run_checks(
        [
            _tensor_sizes,
            _sequence_sizes,
            _layers,
            _pipeline_sizes,
            _recomputed_layers,
            _batch_sizes,
            _batch_tokens,
            _schedule_sizes,
            _validation,
            _exports,
            settings_without_engine,
            fusion_problems,
        ],
        sections,
    )


def _tensor_sizes(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    sizes = {
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "the vocabulary padded to a multiple of 128,": model.padded_vocab_size,
    }
    for name, size in sizes.items():
        if size % parallel.tensor:
            yield f"{name} {size} is not a multiple of parallel.tensor {parallel.tensor}, which splits it; change one of them"


def _sequence_sizes(data: DataConfig, parallel: ParallelConfig) -> Iterator[str]:
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if data.sequence_length % parts:
        why = f"parallel.context {parallel.context}" + (f" x parallel.tensor {parallel.tensor}" if parallel.sequence else "")
        yield f"data.sequence_length {data.sequence_length} is not a multiple of {why}; change one of them"


def rank_shape(parallel: ParallelConfig, data: DataConfig, training: TrainingConfig) -> RankShape:
    """One rank's part of a micro batch."""
    return RankShape(
        tensor=parallel.tensor,
        context=parallel.context,
        sequence_parallel=parallel.sequence,
        cp_comm_type=parallel.cp_comm_type,
        micro_batch_size=training.micro_batch_size,
        sequence_length=data.sequence_length,
        isolates_documents=data.isolates_documents,
        element_bytes=2 if training.precision == "bf16" else 4,
    )


def _layers(model: ModelConfig, parallel: ParallelConfig, data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    """What the layer kinds say, each message once."""
    shape = rank_shape(parallel, data, training)
    found = (problem for layer in dict.fromkeys(model.stack) for problem in layer.kind.problems(layer.options, model, shape))
    yield from dict.fromkeys(found)


def _pipeline_sizes(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if model.num_layers % chunks:
        why = f"parallel.pipeline {parallel.pipeline}"
        why += f" x parallel.virtual_pipeline {parallel.virtual_pipeline}" if parallel.virtual_pipeline else ""
        yield f"model.num_layers {model.num_layers} is not a multiple of {why}; change one of them"
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield "parallel.virtual_pipeline is given, but parallel.pipeline is 1; remove it or use several pipeline ranks"
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence is true, but parallel.tensor is 1: nothing to split; set it to false or use several tensor ranks"


def _recomputed_layers(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> Iterator[str]:
    count, chunks = training.recompute_layers, parallel.pipeline * (parallel.virtual_pipeline or 1)
    if count is None:
        return
    if all(recompute != "full" for recompute in (training.recompute, *(stage.recompute for stage in training.stages or []))):
        yield f"training.recompute_layers is given, but training.recompute is {training.recompute}; remove it or set recompute to full"
    if count > model.num_layers // chunks:
        yield (
            f"training.recompute_layers {count} is more than the {model.num_layers // chunks} layers of a "
            f"{'pipeline stage' if parallel.virtual_pipeline is None else 'model chunk'}; lower it, or remove it to recompute all"
        )


def _batch_sizes(training: TrainingConfig) -> Iterator[str]:
    if training.global_batch_size % training.micro_batch_size:
        yield (
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size}; change one of them"
        )


def _batch_tokens(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    tokens = training.micro_batch_size * data.sequence_length
    if tokens >= 2**31:
        yield (
            f"training.micro_batch_size {training.micro_batch_size} x data.sequence_length {data.sequence_length} is {tokens:,} tokens, "
            "and document boundaries are 32-bit numbers; use a smaller micro batch"
        )


def _schedule_sizes(training: TrainingConfig, optimizer: OptimizerConfig) -> Iterator[str]:
    used = optimizer.warmup_steps + (optimizer.decay_steps or 0)
    if used > training.steps:
        what = "optimizer.warmup_steps" + (" + optimizer.decay_steps" if optimizer.decay_steps else "")
        yield f"{what} is {used}, more than training.steps {training.steps}; shorten the schedule or train longer"


def _validation(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    if training.validate_every is not None and data.validation is None:
        yield "training.validate_every is given, but data.validation is not; name the validation token files or remove validate_every"


def _exports(checkpoint: CheckpointConfig) -> Iterator[str]:
    if checkpoint.export_every is not None and checkpoint.export_every % checkpoint.every:
        yield (
            f"checkpoint.export_every {checkpoint.export_every} is not a multiple of checkpoint.every {checkpoint.every}, and exports are "
            "made from checkpoints; change one of them"
        )


def world_problems(training: TrainingConfig, parallel: ParallelConfig, data_size: int) -> list[str]:
    """What a data-parallel size does not fit: the batch, and the interleaved schedule's count of micro batches."""
    found = []
    per_pass = training.micro_batch_size * data_size
    micro_batches, rest = divmod(training.global_batch_size, per_pass)
    if rest:
        found.append(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} x data-parallel size {data_size} = {per_pass}; change the batch, or start fewer or more ranks"
        )
    # Megatron's interleaved schedule runs micro batches in groups of the pipeline size and refuses a smaller last group.
    elif parallel.virtual_pipeline is not None and micro_batches % parallel.pipeline:
        found.append(
            f"{micro_batches} micro batches a step are not a multiple of parallel.pipeline {parallel.pipeline}, which the interleaved "
            "schedule (parallel.virtual_pipeline) needs; change training.global_batch_size or remove virtual_pipeline"
        )
    return found
