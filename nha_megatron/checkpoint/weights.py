"""All weights of a model in one process, whatever layout wrote them: what an exporter needs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nha_megatron.checkpoint.files import resolve
from nha_megatron.checkpoint.load import is_weight
from nha_megatron.checkpoint.manifest import verify
from nha_megatron.checkpoint.safety import require_plain_data

# Without `hetereogenous_dist_checkpoint` Megatron stacks a parameter of all layers under one name.
_STACKED = re.compile(r"(decoder\.layers)\.(?!\d)(.+)")


def load_weights_full(path: str | Path) -> dict[str, torch.Tensor]:
    """Full (TP 1, PP 1) weights on the CPU, by their name in `GPTModel.state_dict()`.

    `path` is a checkpoint, a `checkpoints` folder or a run's folder. Needs no GPU, no process group and no model: shards
    are put together by their place in the global tensor. Checksums are verified first.
    Raises `CheckpointError` when there is no checkpoint, or it is damaged or unsafe.
    """
    directory = resolve(path)
    verify(directory)
    metadata = require_plain_data(directory)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and is_weight(name)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stacked = _STACKED.fullmatch(name)
        if stacked:
            weights.update({f"{stacked[1]}.{layer}.{stacked[2]}": tensor[layer] for layer in range(tensor.shape[0])})
        else:
            weights[name] = tensor
    return weights
