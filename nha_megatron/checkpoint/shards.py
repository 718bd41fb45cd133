"""This rank's share of a checkpoint: planned with the other ranks, copied to host memory, written by a thread.

Megatron-core says which rank writes what, in torch's distributed checkpoint format. The writing is ours, because Megatron's

- forks the training process (0.16.1), whose threads may hold locks at that moment, or is announced to go (0.19.2);
- starts a server process on every rank for the results, which costs seconds and 250 MB and outlives a killed rank;
- raises a failure of rank 0 on rank 0 alone, while the others wait for it in a collective.

A thread needs a copy of what training changes; it makes the same bytes whether training waits for it or goes on.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import queue
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from nha_megatron.checkpoint.files import reason_of
from nha_megatron.checkpoint.host_memory import HostMemory
from nha_megatron.checkpoint.manifest import FileEntry

_BACKEND, _VERSION = "torch_dist", 1
_COMMON = "common.pt"
# Between two syncs: a fraction of a second on a disk, and thousands of small items share one.
_SYNC_BYTES = 64 * 2**20


class Written(NamedTuple):
    """What a rank's thread leaves behind: where each item lies, its files, and why it failed, if it did."""

    items: list[WriteResult]
    files: dict[str, FileEntry]
    error: str | None


class ShardWriter:
    """Writes this rank's tensors and objects into `directory`, which exists. Making one is collective over all ranks.

    Args:
        state: for `megatron.core.dist_checkpointing`. What is written is its content at this moment.
        copy: whether tensors in host memory are copied, because training will change them while they are written.
        memory: takes the copies of these tensors, and of those on devices.
    """

    def __init__(self, state: dict[str, Any], directory: Path, copy: bool, memory: HostMemory) -> None:
        sharded, common = save_preprocess(state)
        plan = _Plan()
        plan.make(sharded, directory)
        self._writer, self._metadata = plan.writer, plan.metadata
        # Parameter groups and the like: small, the same on all ranks, and changed by the next step.
        buffer = io.BytesIO()
        torch.save(common, buffer)
        self._common = buffer.getvalue()
        self._buckets = [
            (Path(path), name, objects, _on_host(tensors, copy, memory)) for path, name, (objects, tensors) in self._writer.write_buckets
        ]
        self._writer.write_buckets = []  # nothing else needs the tensors of the model
        self.bytes_total = sum(tensor.numel() * tensor.element_size() for *_, tensors in self._buckets for _, tensor in tensors)
        self._streams: list[_Stream] = []
        self._written = Written([], {}, None)
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the thread has ended, well or not."""
        return not self._thread.is_alive()

    @property
    def bytes_written(self) -> int:
        return sum(stream.count for stream in self._streams)

    def result(self) -> Written:
        """Waits for the thread."""
        self._thread.join()
        return self._written

    def write_metadata(self, directory: Path, items: list[list[WriteResult]]) -> None:
        """On rank 0, with what all ranks wrote: the files that make the folder a checkpoint. Raises OSError."""
        (directory / _COMMON).write_bytes(self._common)
        # Both versions read common.pt; 0.19.2 by itself would put its content among the objects, where 0.16.1 does not look.
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(directory))
        self._writer.finish(self._metadata, items)

    def _write(self) -> None:
        items: list[WriteResult] = []
        files: dict[str, FileEntry] = {}
        try:
            while self._buckets:
                path, name, objects, tensors = self._buckets.pop(0)
                with path.open("wb", buffering=0) as file:
                    stream = _Stream(file)
                    self._streams.append(stream)
                    for item, data in [*objects, *tensors]:
                        items.append(_write_item(item, data, name, stream))
                    os.fsync(file.fileno())
                files[name] = FileEntry(stream.count, stream.sha256.hexdigest())
            self._written = Written(items, files, None)
        except Exception as error:  # whatever it is, the ranks hear of it together, when the save is finished
            self._written = Written([], {}, _describe(error))
        finally:
            self._buckets = []


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where it would start writing."""

    def __init__(self) -> None:
        super().__init__(_BACKEND, _VERSION, thread_count=1)

    def make(self, sharded: Any, directory: Path) -> None:
        # Megatron's writer asks for a queue of results, by itself one in a server process. This one stays unused.
        filesystem_async._results_queue = queue.Queue()
        # 0.19.2 has two background writers and plans for the one of another package by default.
        newer = "async_strategy" in inspect.signature(self.async_save).parameters
        self.async_save(sharded, str(directory), **({"async_strategy": "mcore"} if newer else {}))

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> None:
        self.writer = writer
        self.metadata = planned[1]  # of the whole checkpoint, on rank 0


class _Stream(io.RawIOBase):
    """A file that counts and hashes what is written to it, made durable on the way.

    Otherwise `count` would tell how fast memory takes the bytes, and one fsync at the end, during which nothing moves, would
    do all the work of a slow disk.
    An error is kept and raised by `check`: raised from `write` it would pass through torch's zip writer, which hides it.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._error: OSError | None = None
        self.sha256 = hashlib.sha256()
        self.count = 0
        self._unsynced = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        end = self.count + len(view)
        while self._error is None and self.count < end:
            try:
                done = len(view) - (end - self.count)
                written = self._file.write(view[done : done + _SYNC_BYTES - self._unsynced]) or 0
                self._unsynced += written
                if self._unsynced == _SYNC_BYTES:
                    os.fdatasync(self._file.fileno())
                    self._unsynced = 0
                self.count += written
            except OSError as error:
                self._error = error
        self.count = end  # after an error too: torch's zip writer goes by it
        return len(view)

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _write_item(item: Any, data: Any, name: str, stream: _Stream) -> WriteResult:
    """One object or tensor in the form that torch's reader expects."""
    offset = stream.count
    if isinstance(data, io.BytesIO):
        stream.write(data.getbuffer())
    else:
        torch.save(data, stream)
    stream.check()
    length = stream.count - offset
    return WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))


def _on_host(tensors: list[tuple[Any, torch.Tensor]], copy: bool, memory: HostMemory) -> list[tuple[Any, torch.Tensor]]:
    return [(item, memory.copy(tensor) if copy or tensor.is_cuda else tensor.detach()) for item, tensor in tensors]


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return reason_of(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
