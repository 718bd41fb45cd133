"""`training.gradient_accumulation_fusion`: a weight's gradient is added to the fp32 gradient inside the matrix product that makes it.

Without it the product is rounded to the training precision, written, read and added. Megatron's linear layers do it with an extension of
NVIDIA Apex. Embedding, norms and the output matrix (whose gradient the chunked loss accumulates itself) are added as before.
"""

from collections.abc import Iterator
from importlib.util import find_spec

from .training import TrainingConfig

EXTENSION = "fused_weight_gradient_mlp_cuda"
HOW_TO_INSTALL = "build NVIDIA Apex with its C++ and CUDA extensions, or set training.gradient_accumulation_fusion=auto"


def fusion_problems(training: TrainingConfig) -> Iterator[str]:
    """Refuses fusion where it is asked for and nothing could do it."""
    if training.gradient_accumulation_fusion is not True:
        return
    if training.engine == "deepspeed":
        yield (
            "training.gradient_accumulation_fusion true under training.engine deepspeed; not supported, because DeepSpeed takes each "
            "gradient as autograd returns it: set it to auto, or use training.engine megatron"
        )
    elif training.device == "cpu":
        yield (
            f"training.gradient_accumulation_fusion true with training.device cpu; the extension {EXTENSION} runs on CUDA devices: set "
            "it to auto, or training.device to cuda"
        )


def missing_extension(training: TrainingConfig) -> str | None:
    """What to install, when fusion is asked for and the extension is not here."""
    if training.gradient_accumulation_fusion is True and find_spec(EXTENSION) is None:
        return f"training.gradient_accumulation_fusion true: the extension {EXTENSION} is not installed; {HOW_TO_INSTALL}"
    return None


def expected_fusion(training: TrainingConfig) -> str:
    """What a run on this host would do, for people; whether the extension can be loaded shows when it starts."""
    if training.gradient_accumulation_fusion is False:
        return "off, by training.gradient_accumulation_fusion"
    if training.engine == "deepspeed":
        return "off, because DeepSpeed owns the gradients"
    if find_spec(EXTENSION) is None:
        return f"off, because {EXTENSION} (NVIDIA Apex) is not installed here"
    return f"on where the run uses CUDA: {EXTENSION} is installed here"
