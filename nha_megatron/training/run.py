"""`pretrain`: the whole job, from a configuration to a trained model in a run's folder.

<logging.directory>/
    config.yaml       the resolved configuration
    data.json         token files, their checksums, and how far they were compared
    metrics.jsonl     one object a step
    tensorboard/
    checkpoints/      step_N/ with manifests, latest
"""

from __future__ import annotations

import errno
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from nha_megatron.checkpoint import CheckpointError, CheckpointSaver, Progress
from nha_megatron.checkpoint.collective import on_rank_zero
from nha_megatron.checkpoint.files import step_directory, step_of, write_atomically
from nha_megatron.config import ConfigError, RunConfig, save_resolved
from nha_megatron.config.notices import notices
from nha_megatron.data.identity import data_identity
from nha_megatron.data.repetition import describe_reading
from nha_megatron.data.verify import CheckedFile
from nha_megatron.engine.base import Engine
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import Layout, create_layout
from nha_megatron.lock import Lock
from nha_megatron.training.console import Console, print_line
from nha_megatron.training.context import Job, TrainingContext
from nha_megatron.training.data_check import check_data, describe_checked
from nha_megatron.training.exports import BackgroundExport
from nha_megatron.training.guards import TrainingError
from nha_megatron.training.hardware import why_no_mfu
from nha_megatron.training.loop import train
from nha_megatron.training.metrics import MetricsLog
from nha_megatron.training.reporter import Reporter
from nha_megatron.training.stage_data import StageData
from nha_megatron.training.stall import StallWatch
from nha_megatron.training.start import begin_phase, newest_checkpoint


def pretrain(config: RunConfig) -> signal.Signals | None:
    """Runs the job that `config` describes on this rank; every rank of the job calls it.

    Continues from the newest sound checkpoint of the run when there is one. Returns None when the run is complete, or the
    signal (see training/signals.py) on which it was saved and stopped before its end. Raises `ConfigError` for a user's
    mistake and `TrainingError` when the numbers fail.
    """
    joined_here = not dist.is_initialized()
    phases = config.phases
    layout = create_layout(phases[0][0].config, choose_device(config.training.device))
    say = print_line if layout.rank == 0 else _ignore
    config.check_world(layout.world_size)
    files = check_data(config, layout, say)  # first: what is wrong on one node alone is heard of on all ranks
    prepared = False
    stopped_by = None
    identity = data_identity(config)
    with StageData(config) as data, run_lock(config, layout, say):
        reading = describe_reading(config)
        if (chip := why_no_mfu(layout.device)) is not None:
            say(chip)
        for line in [*(f"data: {line}" for line in reading.lines), *(f"warning: {text}" for text in [*reading.warnings, *notices(config)])]:
            say(line)
        job = Job(config, data, identity, say)
        checkpoint = newest_checkpoint(config, layout, say)
        step = 0 if checkpoint is None else step_of(checkpoint)
        while True:
            phase = next((phase for phase in phases if step < phase[-1].last_step), phases[-1])
            if phase is not phases[0]:
                layout = create_layout(phase[0].config, layout.device)
            engine, progress = begin_phase(job, phase[0].config, layout, checkpoint)
            if progress.step >= config.training.steps:
                say(f"the run is complete: step {progress.step} of {config.training.steps}. Raise training.steps to train further")
            else:
                if not prepared:  # not before: a start that is refused changes nothing
                    failure = f"logging.directory {config.logging.directory} cannot be used"
                    on_rank_zero(failure, lambda: prepare_folder(config, files), layout.world)
                    prepared = True
                stopped_by = run(job, engine, progress, phase[-1].last_step)
            destroy_groups = not engine.leaves_groups_alone
            engine.close()
            del engine
            step = progress.step
            if stopped_by or step >= config.training.steps:
                break
            checkpoint = step_directory(config.checkpoint_directory, step)
            # The engine is a cycle of references; its memory is needed for the next one.
            gc.collect()
            if layout.device.type == "cuda":
                torch.cuda.empty_cache()
    if joined_here:
        leave(layout.world, destroy_groups)
    return stopped_by


@contextmanager
def run_lock(config: RunConfig, layout: Layout, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other runs out of this run's folders, while the block runs. Collective; rank 0 holds the locks (nha_megatron/lock.py)."""
    folders = dict.fromkeys(path.resolve() for path in (Path(config.logging.directory), config.checkpoint_directory))
    outer = [folder for folder in folders if not any(other in folder.parents for other in folders)]
    with ExitStack() as held:

        def acquire() -> list[str]:
            return [warning for folder in outer if (warning := _lock_folder(folder, held)) is not None]

        for warning in on_rank_zero(f"the lock of {outer[0]} cannot be taken", acquire, layout.world):
            say(f"warning: {warning}")
        yield


def _lock_folder(folder: Path, held: ExitStack) -> str | None:
    """Takes the folder's lock; returns a warning where the file system knows no locks of that kind."""
    try:
        held.enter_context(Lock(folder / ".lock", "another run writes into this folder"))
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            return f"{folder}: its file system has no hard links, so nothing keeps a second run out of it"
        raise CheckpointError(str(error)) from error
    return None


def prepare_folder(config: RunConfig, files: list[CheckedFile]) -> None:
    """What a run writes before its first step: the resolved configuration, and what was checked of its data."""
    directory = Path(config.logging.directory)
    save_resolved(config, directory / "config.yaml")
    write_atomically(directory / "data.json", describe_checked(config, files))


def run(job: Job, engine: Engine, progress: Progress, until: int) -> signal.Signals | None:
    """Trains from `progress` to step `until`, or until a signal that stops the run, which is returned."""
    config, world = job.config, engine.layout.world
    resolved = config.model_dump(mode="json")
    reporter, say = None, job.say
    published: Callable[[Path, int], None] = _ignore_published
    if engine.layout.rank == 0:
        console = Console(config.training.steps, config.logging.every)
        say = console.event
        exports = BackgroundExport(config, say)
        published = exports.saved
        reporter = Reporter(MetricsLog(config.logging, resolved, progress.step, say), console, exports)

    try:
        with StallWatch(world, config.training.stall_seconds) as watch:
            saver = CheckpointSaver(
                config.checkpoint_directory, engine, resolved, config.checkpoint, say, watch.moved, job.identity, published
            )
            try:
                stopped_by = train(TrainingContext(config, engine, job.data, reporter, saver, watch), progress, until)
            except TrainingError:  # on all ranks together; what is being written is from before
                saver.settle()
                raise
        if reporter is not None and not stopped_by:
            reporter.exports.finish()
        if stopped_by:
            say(f"stopped by {stopped_by.name} after step {progress.step}, which is saved: start again to continue")
        return stopped_by
    finally:
        if reporter is not None:
            reporter.close()


def leave(world: dist.ProcessGroup, destroy_groups: bool) -> None:
    """Leaves the process group together. Only after success: a rank that failed must not wait for the others."""
    dist.barrier(group=world)
    if destroy_groups:
        dist.destroy_process_group()


def _ignore_published(_: Path, __: int) -> None:
    return None


def _ignore(_: str) -> None:
    return None
