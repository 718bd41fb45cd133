"""What the context ranks of a run send each other, by kind of layer."""

from __future__ import annotations

from nha_megatron.config.run import RunConfig


def bytes_sent_per_layer(config: RunConfig) -> dict[str, int]:
    """Label of a layer (such as its window) -> bytes that an inner context rank hands out in its forward, for one micro batch.

    Empty without context parallelism. tests/layers holds the messages to these numbers.
    """
    if config.parallel.context == 1:
        return {}
    layers = dict.fromkeys(config.model.stack)
    return {layer.label: layer.kind.sent_bytes(layer.options, config.model, config.rank_shape) for layer in layers}
