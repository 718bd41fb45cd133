"""The weights in a checkpoint as full tensors, whatever layout wrote them: for exporters, and for runs that start from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nha_megatron.checkpoint.files import resolve
from nha_megatron.checkpoint.manifest import verify
from nha_megatron.checkpoint.safety import require_plain_data

# First parts of the names of what is not a model weight: the optimizer's tensors, and those of state.py.
_OTHER_STATE = ("optimizer.", "chained_", "rng_state")


class CheckpointWeights(Mapping[str, torch.Tensor]):
    """Full (TP 1, PP 1) weights on the CPU by their name in `GPTModel.state_dict()`, each read when it is asked for.

    Needs no GPU, no process group and no model: the files say where each shard lies in the whole tensor. Holds one tensor
    at a time, so that all ranks of a host can take their slices of a large model.
    Raises `CheckpointError` when the checkpoint is unsafe to read; whether it is damaged is for `verify` to say.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors = {
            name: entry
            for name, entry in require_plain_data(directory).state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_OTHER_STATE)
        }
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            entry = self._tensors[name]
            self._last = (name, self._read({name: torch.empty(entry.size, dtype=entry.properties.dtype)})[name])
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read_all(self) -> dict[str, torch.Tensor]:
        """All weights at once, in one pass over the files."""
        return self._read({name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in self._tensors.items()})

    def _read(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(self._directory), no_dist=True)
        return tensors


def load_weights_full(path: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint as full CPU tensors, by their name in `GPTModel.state_dict()`, checksums verified.

    `path` is a checkpoint, a `checkpoints` folder or a run's folder (the newest is taken); see `resolve`.
    Raises `CheckpointError` when there is no checkpoint, or it is damaged or unsafe to read.
    """
    directory = resolve(path)
    verify(directory)
    return CheckpointWeights(directory).read_all()
