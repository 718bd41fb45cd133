"""Warnings of our dependencies that say nothing a user could act on. Each is named, so that new ones are still seen."""

import logging
import warnings
from collections.abc import Callable

_KNOWN = (
    # optional speed-ups of megatron-core, announced once per module and rank
    (UserWarning, r".*Apex (is|are) not installed"),
    (UserWarning, r".*Transformer Engine and Apex are not installed"),
    # megatron-core's own default for a feature that is off
    (UserWarning, r"full scope is deprecated. Use empty cuda_graph_scope"),
    # megatron-core's buffers look at .grad of views
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf"),
    # a checkpoint read by one process, as the export does
    (UserWarning, r"torch\.distributed is disabled, unavailable or uninitialized"),
    # old names of torch's checkpoint functions, which megatron-core calls
    (FutureWarning, r"`(load|save)_state_dict` is deprecated"),
    # a recommendation for chips before Hopper, said on CPUs too
    (UserWarning, r"When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"),
    # renamed in torch 2.13; megatron-core calls the old names, which older versions need
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated. Please use"),
)

_KNOWN_LOG_LINES = (
    # megatron-core 0.19's background writer, which plans here and does not write (checkpoint/shards.py)
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    # our SwiGLU (model/mlp.py) is none of megatron-core's, and needs no more arguments than the defaults
    ("megatron.core.transformer.transformer_layer", "Unknown MLP type"),
    # DeepSpeed on a CPU, where the first line of a run says the device
    ("DeepSpeed", "Setting accelerator to CPU"),
    ("DeepSpeed", "Setting ds_accelerator to"),
    # common.pt, the one form of it that 0.16 and 0.19 both read
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
)


def silence_known_warnings() -> None:
    """Call before Megatron is imported: part of them is issued on import."""
    for category, message in _KNOWN:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, text in _KNOWN_LOG_LINES:
        logging.getLogger(name).addFilter(_without(text))


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()
