"""What the context ranks of a run send each other, by kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nha_megatron.config.full_layers import exchange_bytes

from .arithmetic import context_parallel_bytes

if TYPE_CHECKING:
    from nha_megatron.config.run import RunConfig


def bytes_sent_per_layer(config: RunConfig) -> dict[str, int]:
    """Window (tokens, or `full`) -> bytes that an inner context rank hands out in the forward of such a layer, for one micro batch.

    Empty without context parallelism. tests/attention holds the messages to these numbers.
    """
    parallel = config.parallel
    if parallel.context == 1:
        return {}
    shard = config.data.sequence_length // parallel.context
    sizes: dict[str, int] = {
        "tensor": parallel.tensor,
        "micro_batch_size": config.training.micro_batch_size,
        "element_bytes": 2 if config.training.precision == "bf16" else 4,
    }
    sent = {}
    for window in dict.fromkeys(config.model.windows):
        if window is not None:
            sent[str(window)] = context_parallel_bytes(config.model, window, shard, parallel.context, **sizes)
        elif config.full_layer_exchange is not None:
            sent["full"] = exchange_bytes(config.model, config.full_layer_exchange[0], shard, parallel.context, **sizes)
    return sent
