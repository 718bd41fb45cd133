"""Section `training`: the loop."""

from typing import Annotated, Literal

from pydantic import Field

from .base import NonNegative, NonNegativeReal, Positive, Section
from .deepspeed import DeepSpeedSettings
from .stages import StageConfig


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
    z_loss: NonNegativeReal = 0.0
    """Factor of log(Z)^2, Z the denominator of a token's softmax over the vocabulary: keeps the logits from drifting. 0: none; 1e-4 is
    usual. Losses are reported without it."""
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
