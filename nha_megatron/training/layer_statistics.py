"""What the layers of the stack report of themselves, layer by layer: names and numbers are those of their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from nha_megatron.layers.kind import LayerKind
from nha_megatron.layers.pattern import Layer


def request(model_chunks: Iterable[nn.Module], stack: Sequence[Layer]) -> None:
    """Makes every attention layer measure itself in its next forward, that is in the first micro batch of the next update."""
    for _, kind, attention in _layers(model_chunks, stack):
        kind.request(attention)


def collect(
    model_chunks: Iterable[nn.Module], stack: Sequence[Layer], device: torch.device, world: dist.ProcessGroup
) -> dict[str, list[float | None]]:
    """One number a layer and statistic, the mean over all ranks that hold a part of the layer; None where its kind has no such statistic.

    Each rank adds what its layers measured on its heads and tokens, so the result has the same form at any parallel layout. Collective over
    `world`.
    """
    names = list(dict.fromkeys(name for layer in stack for name in layer.kind.statistics))
    if not names:
        return {}
    totals = torch.zeros(2, len(names), len(stack), dtype=torch.float32, device=device)
    for number, kind, attention in _layers(model_chunks, stack):
        measured = kind.collect(attention)
        assert measured.keys() == set(kind.statistics), (kind.name, measured.keys())
        for name, value in measured.items():
            totals[0, names.index(name), number] += value.to(device, torch.float32)
            totals[1, names.index(name), number] += 1
    dist.all_reduce(totals, group=world)
    sums, counts = totals.tolist()
    return {
        name: [total / count if count else None for total, count in zip(sums[row], counts[row], strict=True)]
        for row, name in enumerate(names)
    }


def _layers(model_chunks: Iterable[nn.Module], stack: Sequence[Layer]) -> Iterator[tuple[int, LayerKind, Any]]:
    """(number from 0, kind, attention module) of every layer on this rank."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                number = module.layer_number - 1
                yield number, stack[number].kind, module.self_attention
