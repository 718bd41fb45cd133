"""What ranks run in the tests of saving: engines that save while they train, and disks that fail, or are slow."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException

from nha_megatron.checkpoint import CheckpointError, Progress, find_newest, load_checkpoint, save_checkpoint
from nha_megatron.checkpoint import load as load_module
from nha_megatron.checkpoint import manifest as manifest_module
from nha_megatron.checkpoint import saver as saver_module
from nha_megatron.checkpoint import shards as shards_module
from nha_megatron.checkpoint.host_memory import HostMemory
from nha_megatron.checkpoint.saver import CheckpointSaver
from nha_megatron.checkpoint.shards import ShardWriter
from nha_megatron.checkpoint.write import PendingSave
from nha_megatron.config import ConfigError, parse_config
from nha_megatron.data.identity import data_identity
from nha_megatron.engine.create import create_engine
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import create_layout
from tests.engine.programs import make_engine, micro_batches, tiny_config
from tests.training import small_run


def save_twice(root: str, parallel: dict[str, Any], precision: str = "fp32", device: str = "cpu") -> None:
    """After two updates, a checkpoint that is waited for in root/waiting; the same again in root/background, of which not a byte is
    written until training has made two more updates."""
    config = tiny_config(parallel=parallel, training={"precision": precision, "device": device})
    engine, plain = make_engine(config), config.model_dump(mode="json")
    for step in range(2):
        engine.train_step(micro_batches(config, engine.layout, step), 1e-2)
    save_checkpoint(Path(root, "waiting"), engine, Progress(2, 128), plain, keep=1)
    with gated_writes() as gate:
        pending = PendingSave(Path(root, "background"), engine, Progress(2, 128), plain, copy=True)
        for step in range(2, 4):
            engine.train_step(micro_batches(config, engine.layout, step), 1e-2)
        assert pending.advance()[:2] == (False, 0)
        gate.set()
        pending.finish(keep=1)


def write_a_tensor_that_changes(directory: str, copy: bool) -> str:
    """sha256 of the file: a tensor of ones, set to zero before the writer starts."""
    tensor = torch.ones(1000)
    writer = ShardWriter({"tensor": ShardedTensor.from_rank_offsets("tensor", tensor)}, Path(directory), copy, HostMemory())
    tensor.zero_()
    writer.start()
    (entry,) = writer.result().files.values()
    return entry.sha256


@contextmanager
def gated_writes() -> Iterator[threading.Event]:
    """Writers of this rank wait at their first byte until the event is set."""
    gate = threading.Event()
    original = shards_module._write_item

    def write_item(*arguments: Any) -> Any:
        assert gate.wait(60)
        return original(*arguments)

    with mock.patch.object(shards_module, "_write_item", write_item):
        yield gate


def pretrain_with_a_file_limit(
    plain: dict[str, Any], limit: int, rank: int | None, lifted_after: int | None = None
) -> tuple[str | None, list[str]]:
    """On `rank`, or on all, no file may grow beyond `limit` bytes, which fails as a full disk does: in the middle of a write.

    `lifted_after`: failures after which there is room again. Returns the message at the end and the warnings.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank in (None, dist.get_rank()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    def after_failure(count: int) -> None:
        if count == lifted_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    try:
        return _pretrain_and_listen(plain, after_failure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pretrain_with_a_failing_call(plain: dict[str, Any], where: str) -> tuple[str | None, list[str]]:
    """On rank 0, the named function of `checkpoint/write.py` or `shards.py` fails once, at the second checkpoint, as on a full disk."""
    module, _, name = where.partition(".")
    owner = {"write": PendingSave.__init__.__globals__, "shards": vars(shards_module)}[module]
    original, calls = owner[name], 0

    def fails(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
        return original(*arguments, **keywords)

    if dist.get_rank() == 0:
        owner[name] = fails
    try:
        return _pretrain_and_listen(plain)
    finally:
        owner[name] = original


def pretrain_on_a_slow_disk(plain: dict[str, Any], seconds_per_item: float) -> tuple[str | None, list[str]]:
    original = shards_module._write_item

    def write_item(*arguments: Any) -> Any:
        time.sleep(seconds_per_item)
        return original(*arguments)

    with mock.patch.object(shards_module, "_write_item", write_item), mock.patch.object(saver_module, "_REPORT_S", 0.5):
        return _pretrain_and_listen(plain)


def pretrain_until_signalled(plain: dict[str, Any], step: int) -> tuple[str | None, list[str]]:
    """Rank 0 gets SIGUSR1 at the start of `step`; the checkpoint before is not written until the stop has been agreed."""
    original = CheckpointSaver.save

    with gated_writes() as gate:

        def save(self: CheckpointSaver, progress: Progress, last: bool = False) -> None:
            if last:
                gate.set()
            elif progress.step == step - 1 and dist.get_rank() == 0:
                threading.Timer(0, os.kill, [os.getpid(), signal.SIGUSR1]).start()
            original(self, progress, last)

        with mock.patch.object(CheckpointSaver, "save", save):
            return _pretrain_and_listen(plain)


def _pretrain_and_listen(plain: dict[str, Any], after_failure: Callable[[int], None] = lambda count: None) -> tuple[str | None, list[str]]:
    said: list[str] = []
    original_init, original_failed = CheckpointSaver.__init__, CheckpointSaver._failed

    def init(self: CheckpointSaver, *arguments: Any, **keywords: Any) -> None:
        original_init(self, *arguments, **keywords)
        say = self._say
        self._say = lambda text: (said.append(text), say(text))[1]

    def failed(self: CheckpointSaver, *arguments: Any) -> None:
        try:
            original_failed(self, *arguments)
        finally:
            after_failure(self._failures)

    with mock.patch.object(CheckpointSaver, "__init__", init), mock.patch.object(CheckpointSaver, "_failed", failed):
        return small_run.pretrain_on_rank(plain), said


class OneTensorEngine:
    """An engine to `PendingSave`: one tensor, of which rank 0 has all, or one of two halves that nobody else has."""

    device = torch.device("cpu")

    def __init__(self, is_whole: bool) -> None:
        self._is_whole = is_whole
        self.layout = SimpleNamespace(world=dist.group.WORLD)

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        offset = () if self._is_whole else ((0, 0, 2),)
        return {"tensor": ShardedTensor.from_rank_offsets("tensor", torch.ones(4), *offset, replica_id=dist.get_rank())}


def save_one_tensor(root: str, is_whole: bool) -> None:
    engine: Any = OneTensorEngine(is_whole)
    save_checkpoint(Path(root), engine, Progress(2, 128), {}, keep=1)


def save_half_a_tensor(root: str) -> str:
    """The name of what is raised."""
    try:
        save_one_tensor(root, is_whole=False)
    except (CheckpointError, CheckpointingException) as error:
        return type(error).__name__
    return "saved"


def save_with_a_fault_of_the_program(root: str) -> str:
    """The name of what each rank raises when rank 0 alone meets an error that is none of the disk's."""

    def write_manifest(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    try:
        with mock.patch.dict(PendingSave._publish.__globals__, write_manifest=write_manifest):
            save_one_tensor(root, is_whole=True)
    except (CheckpointError, ZeroDivisionError) as error:
        dist.barrier()  # no rank waits in another collective
        return type(error).__name__
    return "saved"


def find(root: str) -> tuple[list[str], str | None]:
    """What was reported on the way to the newest sound checkpoint, and its path."""
    reports: list[str] = []
    try:
        newest = find_newest(Path(root), reports.append, dist.group.WORLD)
    except CheckpointError:  # there are some, and none can be loaded
        newest = None
    return reports, None if newest is None else str(newest)


def find_where_one_rank_cannot_read(root: str, name: str) -> tuple[list[str], str | None]:
    """As `find`; the manifest of checkpoint `name` cannot be read on rank 1."""
    original = manifest_module.read_manifest

    def read_manifest(directory: Path) -> manifest_module.Manifest:
        if directory.name == name and dist.get_rank() == 1:
            raise CheckpointError(f"checkpoint {directory}: manifest.json cannot be read: Stale file handle")
        return original(directory)

    with mock.patch.object(manifest_module, "read_manifest", read_manifest):
        return find(root)


def resume_where_a_rank_cannot_read(plain: dict[str, Any], rank: int) -> tuple[list[str], str | int | None]:
    """As `resume`; on `rank` the newest manifest cannot be read any more when it comes to loading."""
    if dist.get_rank() != rank:
        return resume(plain)
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "manifest.json")
    calls = itertools.count()

    def read_manifest(directory: Path) -> manifest_module.Manifest:
        if next(calls) == (1 if rank == 0 else 0):  # rank 0 has looked at it before, to find it
            raise stale
        return manifest_module.read_manifest(directory)

    with mock.patch.object(load_module, "read_manifest", read_manifest):
        return resume(plain)


def resume(plain: dict[str, Any]) -> tuple[list[str], str | int | None]:
    """Finds and loads the newest checkpoint: what was reported on the way, and the step reached or the message of the refusal."""
    config = parse_config(plain)
    reports: list[str] = []
    layout = create_layout(config, choose_device(config.training.device))
    try:
        newest = find_newest(config.checkpoint_directory, reports.append, layout.world)
        if newest is None:
            return reports, None
        engine = create_engine(config, layout.device, layout)
        return reports, load_checkpoint(newest, engine, config.model_dump(mode="json"), data_identity(config)).step
    except ConfigError as error:
        return reports, str(error)
