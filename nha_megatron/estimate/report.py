"""What `check` prints about a configuration."""

import math
from dataclasses import replace

from nha_megatron.config.gradient_fusion import expected_fusion
from nha_megatron.config.inputs import missing_inputs
from nha_megatron.config.load import dump_config
from nha_megatron.config.model import ModelConfig
from nha_megatron.config.notices import notices
from nha_megatron.config.run import RunConfig
from nha_megatron.config.stage_plan import Stage
from nha_megatron.data.repetition import describe_reading
from nha_megatron.estimate.counts import flops_per_token, num_parameters, state_bytes
from nha_megatron.layers.pattern import DEFAULT_KIND, describe_runs

from .memory import RankMemory, estimate_memory
from .traffic import bytes_sent_per_layer


def check_report(config: RunConfig, world_size: int | None = None) -> str:
    """The resolved configuration as YAML, followed by facts about it; the whole text is valid YAML.

    Without a world size the smallest world that fits is described. Raises `ConfigError` when the world does not fit.
    """
    stages = config.stages
    world = math.lcm(*(stage.config.parallel.model_ranks for stage in stages)) if world_size is None else world_size
    facts = {
        "model": _model_lines(config, stages),
        f"layout of {world} ranks" + ("" if world_size else ", the fewest"): _layout_lines(config, world),
    }
    for stage in stages:
        name = f"stage {stage.number} of {len(stages)}: " if len(stages) > 1 else ""
        facts |= {
            f"{name}batches and messages": _stage_lines(stage, world),
            f"{name}memory of the fullest rank, estimated": _memory_lines(estimate_memory(stage.config, world)),
        }
    reading = describe_reading(config)
    facts["data"] = reading.lines
    facts["worth knowing"] = [*reading.warnings, *notices(config)]
    facts["gradient accumulation fusion"] = [expected_fusion(config.training)]
    facts["not found (needed before pretrain)"] = missing_inputs(config)
    comments = [line for title, lines in facts.items() if lines for line in ("#", f"# {title}", *(f"#   {line}" for line in lines))]
    return dump_config(config) + "\n".join(comments)


def _model_lines(config: RunConfig, stages: tuple[Stage, ...]) -> list[str]:
    model = config.model
    lines = [
        f"parameters: {num_parameters(model):,}, without embeddings {num_parameters(model, embeddings=False):,}",
        f"{_what_varies(model)}: {describe_runs(_labels(model))}",
        f"vocabulary: {model.vocab_size:,} tokens, padded to {model.padded_vocab_size:,}",
    ]
    for length in dict.fromkeys(stage.config.data.sequence_length for stage in stages):
        lines += [
            f"FLOPs a token, forward and backward: {flops_per_token(model, length):.4g} at length {length:,}",
            f"state of one sequence of {length:,} tokens, bf16: {_size(state_bytes(model, length))}",
        ]
    return lines


def _layout_lines(config: RunConfig, world: int) -> list[str]:
    config.check_world(world)
    phases = config.phases
    lines = []
    for stages in phases:
        parallel = stages[0].config.parallel
        text = f"tensor {parallel.tensor} x context {parallel.context} x data {parallel.data(world)} x pipeline {parallel.pipeline}"
        lines.append(f"{text}, from step {stages[0].steps_before + 1:,}" if len(phases) > 1 else text)
    return [*lines, "tensor ranks are neighbours"]


def _stage_lines(stage: Stage, world: int) -> list[str]:
    config = stage.config
    parallel, training, length = config.parallel, config.training, config.data.sequence_length
    lines = [
        f"steps {stage.steps_before + 1:,} to {stage.last_step:,}, tokens {stage.tokens_before:,} to {stage.tokens_after:,}",
        f"micro batches a rank and step: {config.micro_batches(world)} of {training.micro_batch_size} x "
        f"{length // parallel.context:,} tokens",
        f"tokens: {stage.tokens_per_step:,} a step, {stage.tokens_after - stage.tokens_before:,} in {stage.steps:,} steps",
        _schedule_line(stage),
    ]
    return [*lines, *_exchange_lines(config)]


def _what_varies(model: ModelConfig) -> str:
    return "window of the layers" if {layer.kind.name for layer in model.stack} == {DEFAULT_KIND} else "layers"


def _labels(model: ModelConfig) -> list[str]:
    """With the kind in front where there are several and the label does not say it."""
    several = len({layer.kind.name for layer in model.stack}) > 1
    return [
        f"{layer.kind.name}:{layer.label}" if several and not layer.label.startswith(layer.kind.name) else layer.label
        for layer in model.stack
    ]


def _exchange_lines(config: RunConfig) -> list[str]:
    sent = bytes_sent_per_layer(config)
    lines = []
    plain = [layer for layer in config.model.stack if sent and layer.label not in config.exchanges]
    if plain:
        mean = _size(sum(sent[layer.label] for layer in plain) // len(plain))
        longer = replace(config.rank_shape, sequence_length=2 * config.data.sequence_length)
        constant = all(layer.kind.sent_bytes(layer.options, config.model, longer) == sent[layer.label] for layer in set(plain))
        lines.append(f"context parallelism: a rank sends {mean} a layer and micro batch" + (", at any length" if constant else ""))
    for label, (exchange, reason) in config.exchanges.items():
        amount = f"a rank sends {_size(sent[label])} a layer and micro batch"
        lines.append(f"context parallelism of `{label}` layers: {exchange}, because {reason}; {amount}")
    return lines


def _schedule_line(stage: Stage) -> str:
    optimizer, steps = stage.config.optimizer, stage.config.training.steps
    parts = [f"learning rate: {optimizer.schedule} up to {optimizer.lr:g}", f"warm-up of {optimizer.warmup_steps:,} steps"]
    if optimizer.decay_steps is not None:
        parts.append(f"decay of {optimizer.decay_steps:,}")
    return ", ".join(parts) + f", over steps {stage.schedule_begins + 1:,} to {stage.schedule_begins + steps:,}"


def _memory_lines(memory: RankMemory) -> list[str]:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        **(
            {"output matrix and loss": memory.head}
            if memory.head >= memory.layer_backward
            else {"backward of one layer": memory.layer_backward}
        ),
    }
    detail = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    return [f"{_size(memory.total)} on pipeline stage {memory.pipeline_stage}: {detail}", "without communication buffers and fragmentation"]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
