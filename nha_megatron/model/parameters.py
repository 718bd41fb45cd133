"""Parameters by names that do not depend on the layout, and the slices of them that ranks hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def global_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything on this rank, named as in a model on one rank.

    Layer numbers count from 0 over the whole model, whatever the pipeline stage. Where tied embeddings keep a second copy on the last
    stage, that copy has the name of the embedding, as it is the same parameter.
    """
    for chunk in chunks:
        model = unwrap_model(chunk)
        for name, parameter in model.named_parameters():
            match = _LAYER.match(name)
            if match:
                number = model.decoder.layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{number}.{name[match.end() :]}"
            if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
                name = "embedding.word_embeddings.weight"
            yield name, parameter


def partition_dim(parameter: nn.Parameter) -> int | None:
    """The dimension that tensor parallelism splits, None for a replicated parameter."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def full_shape(parameter: nn.Parameter, tp_size: int) -> tuple[int, ...]:
    """Shape on one rank."""
    shape = list(parameter.shape)
    dim = partition_dim(parameter)
    if dim is not None:
        shape[dim] *= tp_size
    return tuple(shape)


def shard_of(full: Tensor, parameter: nn.Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """The slice of the full tensor that TP rank `tp_rank` holds in `parameter`."""
    dim = partition_dim(parameter)
    if dim is None:
        return full
    # A gated MLP's first matrix is [gate; up]: a rank holds its rows of each.
    stride = parameter.partition_stride
    pieces = [half.chunk(tp_size, dim)[tp_rank] for half in full.chunk(stride, dim)]
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]


def full_from_shards(shards: Sequence[Tensor], parameter: nn.Parameter) -> Tensor:
    """The full tensor from what all TP ranks hold, in rank order: the inverse of `shard_of`."""
    dim = partition_dim(parameter)
    if dim is None:
        return shards[0]
    halves = zip(*(shard.chunk(parameter.partition_stride, dim) for shard in shards), strict=True)
    return torch.cat([torch.cat(half, dim) for half in halves], dim)
