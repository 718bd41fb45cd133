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
    # renamed in torch 2.13; megatron-core calls the old names, which older versions need
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated. Please use"),
)

_KNOWN_LOG_LINES = (
    # megatron-core 0.19's background writer, which plans here and does not write (checkpoint/shards.py)
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
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
