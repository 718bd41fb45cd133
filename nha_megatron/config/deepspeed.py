"""`training.deepspeed`: what the DeepSpeed engine is told besides what the run's own sections say.

Written as DeepSpeed's own JSON, inline in the YAML or as the path of a JSON file (configs/deepspeed/), and kept inline in the resolved
configuration. Only what distributes the state is said here; batch sizes, precision, optimizer and clipping have their sections.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .base import Positive, Section
from .json_text import read_json


def _whole(value: object) -> object:
    # DeepSpeed's files write element counts as 5e8, which JSON and YAML read as a real number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[Positive, BeforeValidator(_whole)]

# Keys of DeepSpeed that the run's own sections decide, or that the engine does not do: what to do instead.
_DECIDED_ELSEWHERE = {
    "train_batch_size": "training.global_batch_size is the batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size is the micro batch",
    "gradient_accumulation_steps": "it follows from training.global_batch_size, training.micro_batch_size and the number of ranks",
    "gradient_clipping": "optimizer.clip_grad is the limit",
    "optimizer": "section `optimizer` describes AdamW",
    "scheduler": "section `optimizer` holds the schedule",
    "bf16": "training.precision chooses it",
    "bfloat16": "training.precision chooses it",
    "data_types": "gradients are accumulated and reduced in fp32",
    "communication_data_type": "gradients are accumulated and reduced in fp32",
    "activation_checkpointing": "training.recompute chooses it",
    "tensor_parallel": "parallel.tensor is the size",
    "sequence_parallel_size": "parallel.context is the size",
    "pipeline": "the engine has no pipeline; training.engine megatron has",
    "tensorboard": "section `logging` chooses it",
    "wandb": "section `logging` chooses it",
    "fp16": "not supported, because there is no loss scale; use training.precision bf16",
}
_NOT_SUPPORTED = {
    "offload_optimizer": "not supported, because checkpoints take the optimizer's state from the devices; use more ranks, or stage 3",
    "offload_param": "not supported, because checkpoints take the weights from the devices; use more ranks",
    "cpu_offload": "not supported, because checkpoints take the optimizer's state from the devices; use more ranks, or stage 3",
    "zero_hpz_partition_size": "not supported, because checkpoints know one partition of a weight; remove it",
    "round_robin_gradients": "not supported, because DeepSpeed 0.19.8 then hands out the state of other weights; remove it",
    "zero_quantized_weights": "not supported, because the loss would no longer equal the Megatron engine's; remove it",
    "zero_quantized_gradients": "not supported, because the loss would no longer equal the Megatron engine's; remove it",
}


class ZeroConfig(Section):
    """DeepSpeed's `zero_optimization`. Left out, a size is DeepSpeed's default, and no bucket is larger than the model."""

    stage: Literal[1, 2, 3]
    """What is sharded over data x context ranks: optimizer state (1), gradients too (2), weights too (3)."""
    reduce_bucket_size: Elements | None = None
    """Gradient elements that are reduced at once."""
    allgather_bucket_size: Elements | None = None
    """Weight elements that are gathered at once after the update, stages 1 and 2."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they are made."""
    overlap_comm: bool = False
    """Reduce gradients during the backward."""
    sub_group_size: Elements | None = None
    """Elements that the optimizer of stage 3 updates at once."""
    stage3_prefetch_bucket_size: Elements | None = None
    """Weight elements gathered ahead of the layer that needs them."""
    stage3_param_persistence_threshold: Annotated[int, BeforeValidator(_whole), Field(ge=0)] | None = None
    """Weights with fewer elements stay whole on every rank."""
    stage3_max_live_parameters: Elements | None = None
    """Weight elements that a rank holds at most before it lets some go."""
    stage3_max_reuse_distance: Elements | None = None
    """A weight that is needed again within so many elements is kept."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return _accept(data, _NOT_SUPPORTED) if isinstance(data, Mapping) else data


class DeepSpeedConfig(Section):
    """The part of a DeepSpeed configuration that this system takes."""

    zero_optimization: ZeroConfig
    """What ZeRO shards, and in what pieces it communicates."""

    @model_validator(mode="before")
    @classmethod
    def _decided_here(cls, data: Any) -> Any:
        return _accept(data, _DECIDED_ELSEWHERE) if isinstance(data, Mapping) else data


def _accept(data: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, Any]:
    """`data` without the unsupported features that it switches off; any other key that has a reason is refused with it."""
    accepted, problems = {}, []
    for key, value in data.items():
        unsupported = "not supported" in reasons.get(key, "")
        if unsupported and _is_off(value):
            continue
        accepted[key] = value
        if key in reasons:
            problems.append(f"{key}: {reasons[key]}" + ("" if unsupported else "; remove it"))
    if problems:
        raise ValueError("\n".join(problems))
    return accepted


def _is_off(value: object) -> bool:
    # DeepSpeed's files often spell out what they do not use.
    return not value or (isinstance(value, Mapping) and (value.get("device") == "none" or value.get("enabled") is False))


def _read_file(value: object) -> object:
    """A path becomes the content of the file, so that the resolved configuration needs no other file."""
    if not isinstance(value, str):
        return value
    try:
        content = read_json(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{value!r} cannot be read: {error.strerror}; give a JSON file such as `nha-megatron example zero1` prints"
        ) from None
    except ValueError as error:
        raise ValueError(f"{value!r} is not JSON: {error}; write it like what `nha-megatron example zero1` prints") from None
    if not isinstance(content, dict):
        raise ValueError(f"{value!r} holds no JSON object; it must be like what `nha-megatron example zero1` prints")
    return content


DeepSpeedSettings = Annotated[DeepSpeedConfig, BeforeValidator(_read_file)]
