"""What the attention layers do, layer by layer: share of the softmax on slots, mean decay, write strength."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from nha_megatron.layers.nha.layer import NativeHybridAttention

NAMES = ("slot_share", "mean_decay", "write_strength")


def request(model_chunks: Iterable[nn.Module]) -> None:
    """Makes every attention layer measure itself in its next forward, that is in the first micro batch of the next update."""
    for layer in _layers(model_chunks):
        layer.record_statistics = True


def collect(model_chunks: Iterable[nn.Module], num_layers: int, device: torch.device, world: dist.ProcessGroup) -> dict[str, list[float]]:
    """One number a layer and statistic, the mean over all ranks that hold a part of the layer. Collective over all ranks.

    Each rank adds what its layers measured on its heads and tokens, so the result has the same form at any parallel layout.
    """
    totals = torch.zeros(len(NAMES) + 1, num_layers, dtype=torch.float32, device=device)
    for layer in _layers(model_chunks):
        assert layer.statistics is not None, "`request` comes before the forward"
        column = layer.layer_number - 1
        totals[:-1, column] += torch.stack([layer.statistics[name].to(device, torch.float32) for name in NAMES])
        totals[-1, column] += 1
        layer.statistics = None
    dist.all_reduce(totals, group=world)
    means = (totals[:-1] / totals[-1]).tolist()
    return dict(zip(NAMES, means, strict=True))


def _layers(model_chunks: Iterable[nn.Module]) -> Iterator[NativeHybridAttention]:
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, NativeHybridAttention):
                yield module
