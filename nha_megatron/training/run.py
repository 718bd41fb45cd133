"""`pretrain`: the whole job, from a configuration to a trained model in a run's folder.

<logging.directory>/
    config.yaml       the resolved configuration
    data.json         token files, their checksums, and how far they were compared
    metrics.jsonl     one object a step
    tensorboard/
    checkpoints/      step_N/ with manifests, latest
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nha_megatron.checkpoint import (
    CheckpointError,
    CheckpointSaver,
    Progress,
    find_newest,
    load_checkpoint,
    load_weights,
    resolve,
)
from nha_megatron.checkpoint.collective import on_rank_zero
from nha_megatron.checkpoint.files import published_steps, step_directory, step_of, write_atomically
from nha_megatron.config import RunConfig, save_resolved
from nha_megatron.config.engines import zero_settings
from nha_megatron.data.identity import data_identity
from nha_megatron.data.verify import CheckedFile
from nha_megatron.engine.base import Engine
from nha_megatron.engine.create import create_engine
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import Layout, create_layout
from nha_megatron.estimate.counts import num_parameters
from nha_megatron.training.console import Console
from nha_megatron.training.data_check import check_data, describe_checked
from nha_megatron.training.guards import TrainingError
from nha_megatron.training.loop import Reporter, train
from nha_megatron.training.metrics import MetricsLog
from nha_megatron.training.stage_data import StageData
from nha_megatron.training.stall import StallWatch


def pretrain(config: RunConfig) -> signal.Signals | None:
    """Runs the job that `config` describes on this rank; every rank of the job calls it.

    Continues from the newest sound checkpoint of the run when there is one. Returns None when the run is complete, or the
    signal (see training/signals.py) on which it was saved and stopped before its end. Raises `ConfigError` for a user's
    mistake and `TrainingError` when the numbers fail.
    """
    joined_here = not dist.is_initialized()
    phases = config.phases
    layout = create_layout(phases[0][0].config, choose_device(config.training.device))
    say = print if layout.rank == 0 else _ignore
    config.check_world(layout.world_size)
    files = check_data(config, layout, say)  # first: what is wrong on one node alone is heard of on all ranks
    identity = data_identity(config)
    prepared = False
    stopped_by = None
    with StageData(config) as data:
        checkpoint = newest_checkpoint(config, say)
        step = 0 if checkpoint is None else step_of(checkpoint)
        while True:
            phase = next((phase for phase in phases if step < phase[-1].last_step), phases[-1])
            if phase is not phases[0]:
                layout = create_layout(phase[0].config, layout.device)
            engine, progress = begin_phase(config, phase[0].config, layout, checkpoint, identity, say)
            if progress.step >= config.training.steps:
                say(f"the run is complete: step {progress.step} of {config.training.steps}. Raise training.steps to train further")
            else:
                if not prepared:  # not before: a start that is refused changes nothing
                    failure = f"logging.directory {config.logging.directory} cannot be used"
                    on_rank_zero(failure, lambda: prepare_folder(config, files))
                    prepared = True
                stopped_by = run(config, engine, layout, data, identity, progress, phase[-1].last_step, say)
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
        leave(config, layout)
    return stopped_by


def begin_phase(
    config: RunConfig, built: RunConfig, layout: Layout, checkpoint: Path | None, identity: dict[str, Any], say: Callable[[str], None]
) -> tuple[Engine, Progress]:
    """Builds the model as `built`, the configuration of the phase's first stage, and continues from `checkpoint` or starts anew."""
    engine = create_engine(built, layout.device, layout)
    say(f"{layout.describe()} on {layout.device.type}, {num_parameters(config.model):,} parameters")
    for choice in engine.choices:
        say(choice)
    zero = zero_settings(config.training)
    if zero is not None:
        say(f"engine deepspeed, ZeRO stage {zero.stage}")
    for label, (exchange, reason) in built.exchanges.items():
        say(f"`{label}` layers over {layout.cp_size} context ranks: {exchange}, because {reason}")
    return engine, start(config, engine, checkpoint, identity, say)


def newest_checkpoint(config: RunConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from. Raises `CheckpointError` when there are some and `checkpoint.resume` is false."""
    root = config.checkpoint_directory
    if config.checkpoint.resume:
        return find_newest(root, say)
    if published_steps(root):
        raise CheckpointError(
            f"checkpoint.resume is false, but {root} already holds checkpoints, which a later resume would mix up with this run's. "
            "Choose another logging.directory, delete them, or set checkpoint.resume=true"
        )
    return None


def start(config: RunConfig, engine: Engine, checkpoint: Path | None, identity: dict[str, Any], say: Callable[[str], None]) -> Progress:
    """Where the run begins: the checkpoint, the weights of `model.init_from`, or fresh weights.

    `identity`: what the run reads; a checkpoint of a run on other data is refused unless `checkpoint.other_data` accepts it.
    """
    if checkpoint is not None:
        expected = identity if config.checkpoint.other_data == "refuse" else None
        progress = load_checkpoint(checkpoint, engine, config.model_dump(mode="json"), expected)
        say(f"resumed from {checkpoint}: step {progress.step}, {progress.tokens:,} tokens")
        return progress
    if config.model.init_from is not None:
        load_initial_weights(Path(config.model.init_from), config, engine)
        say(f"weights taken from {config.model.init_from}")
    return Progress()


def load_initial_weights(path: Path, config: RunConfig, engine: Engine) -> None:
    """Weights only, from a checkpoint of this project or from a directory that it exported to Hugging Face format."""
    if (path / "config.json").is_file():
        # Imported here: transformers takes seconds, and only this needs it.
        from nha_megatron.hf.import_ import load_hf_weights

        engine.load_weights(load_hf_weights(path, config.model))
    else:
        load_weights(resolve(path), engine)


def prepare_folder(config: RunConfig, files: list[CheckedFile]) -> None:
    """What a run writes before its first step: the resolved configuration, and what was checked of its data."""
    directory = Path(config.logging.directory)
    save_resolved(config, directory / "config.yaml")
    write_atomically(directory / "data.json", describe_checked(config, files))


def run(
    config: RunConfig,
    engine: Engine,
    layout: Layout,
    data: StageData,
    identity: dict[str, Any],
    progress: Progress,
    until: int,
    say: Callable[[str], None],
) -> signal.Signals | None:
    """Trains from `progress` to step `until`, or until a signal that stops the run, which is returned."""
    resolved = config.model_dump(mode="json")
    reporter = None
    if layout.rank == 0:
        reporter = Reporter(MetricsLog(config.logging, resolved, progress.step), Console(config.training.steps, config.logging.every))
        say = reporter.console.event

    try:
        with StallWatch(layout.rank, layout.world_size, config.training.stall_seconds) as watch:
            saver = CheckpointSaver(config.checkpoint_directory, engine, resolved, config.checkpoint, say, watch.moved, identity)
            try:
                stopped_by = train(config, engine, layout, data, progress, reporter, saver, watch, until)
            except TrainingError:  # on all ranks together; what is being written is from before
                saver.settle()
                raise
        if stopped_by:
            say(f"stopped by {stopped_by.name} after step {progress.step}, which is saved: start again to continue")
        return stopped_by
    finally:
        if reporter is not None:
            reporter.close()


def leave(config: RunConfig, layout: Layout) -> None:
    """Leaves the process group together. Only after success: a rank that failed must not wait for the others."""
    dist.barrier()
    zero = zero_settings(config.training)
    if zero is not None and zero.stage == 3 and layout.device.type == "cpu":
        return  # now and then the process aborts when gloo's groups are destroyed after ZeRO 3 (DeepSpeed 0.19.8, torch 2.13)
    dist.destroy_process_group()


def _ignore(_: str) -> None:
    return None
