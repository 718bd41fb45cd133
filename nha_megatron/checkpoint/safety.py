"""Refuses a checkpoint that could run code when it is read.

torch's distributed checkpoint format holds three kinds of bytes:
- tensors, which torch reads with weights_only=True;
- `.metadata`, which torch reads with plain `pickle.load`;
- objects (optimizer parameter groups, and in megatron-core from 0.17 on the common state), which torch's load planner
  reads with `torch.load(weights_only=False)`. In megatron-core 0.16 the common state is `common.pt`, read with torch's
  default, weights_only=True since torch 2.6.

The second and the third are read here first: `.metadata` by an unpickler that knows only the classes torch writes, the
objects with weights_only=True. Bytes that pass cannot name anything else when torch reads them again. Checksums alone
would not do: whoever can write a file can write its checksum.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nha_megatron.checkpoint.files import CheckpointError, reason_of

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.planner", "SavePlan"),
    (f"{_DCP}.planner", "WriteItem"),
    (f"{_DCP}.planner", "WriteItemType"),
    (f"{_DCP}.planner", "TensorWriteData"),
    (f"{_DCP}.planner", "BytesIOWriteData"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),  # "torch.strided" -> the layout of that name
    ("torch", "Size"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(directory: Path) -> Metadata:
    """The `.metadata` of a torch distributed checkpoint, read without executing code.

    Raises `CheckpointError` when it holds anything but what torch writes there.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory}: .metadata cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"checkpoint {directory}: .metadata is damaged or unsafe: {error}") from error
    if not isinstance(content, Metadata):
        raise CheckpointError(f"checkpoint {directory}: .metadata holds a {type(content).__name__}, not checkpoint metadata")
    return content


def require_plain_data(directory: Path) -> Metadata:
    """Reads all pickled objects of a checkpoint the safe way; returns its metadata.

    Raises `CheckpointError` when one of them holds more than tensors, numbers, text and containers of these, or when an object or
    tensor is said to lie where there is nothing.
    """
    metadata = read_metadata(directory)
    common = directory / "common.pt"
    if common.exists():
        _require_plain(directory, "common.pt", common.read_bytes())
    elif not any(name.startswith("common_state") for name in metadata.state_dict_metadata):
        raise CheckpointError(f"checkpoint {directory}: common.pt is missing")
    sizes: dict[Path, int] = {}
    try:
        for index, place in (metadata.storage_data or {}).items():
            path = (directory / place.relative_path).resolve()
            if not path.is_relative_to(directory.resolve()):
                raise CheckpointError(
                    f"checkpoint {directory}: {index.fqn} is said to lie outside the checkpoint, in {place.relative_path}"
                )
            size = sizes[path] = sizes.get(path) or path.stat().st_size
            if not 0 <= place.offset <= place.offset + place.length <= size:
                raise CheckpointError(f"checkpoint {directory}: {index.fqn} is said to lie beyond the end of {place.relative_path}")
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                with path.open("rb") as file:
                    file.seek(place.offset)
                    _require_plain(directory, f"the object {index.fqn}", file.read(place.length))
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {reason_of(error)}") from error
    except (AttributeError, TypeError) as error:  # classes that torch writes, with other things inside
        raise CheckpointError(f"checkpoint {directory}: .metadata is damaged or unsafe: {error}") from error
    return metadata


def _require_plain(directory: Path, what: str, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {directory}: {what} is damaged or unsafe: {reason}") from error
