"""How a run begins: the engine is made, and continues from a checkpoint, or starts from given or fresh weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nha_megatron.checkpoint import CheckpointError, Progress, find_newest, load_checkpoint, load_weights, read_manifest, resolve
from nha_megatron.checkpoint.changes import changed_values
from nha_megatron.checkpoint.collective import on_rank_zero
from nha_megatron.checkpoint.files import published_steps, rename_to_free
from nha_megatron.config import RunConfig
from nha_megatron.engine.base import Engine
from nha_megatron.engine.create import create_engine
from nha_megatron.engine.layout import Layout
from nha_megatron.estimate.counts import num_parameters
from nha_megatron.training.context import Job
from nha_megatron.training.metrics import METRICS_FILE


def newest_checkpoint(config: RunConfig, layout: Layout, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from. Raises `CheckpointError` when there are some and `checkpoint.resume` is false, or none loads."""
    root = config.checkpoint_directory
    if config.checkpoint.resume:
        fresh = config.checkpoint.resume == "fresh"
        newest = find_newest(root, say, layout.world, fresh)
        if fresh and newest is None:
            metrics = Path(config.logging.directory) / METRICS_FILE
            kept = on_rank_zero(f"{metrics} cannot be set aside", lambda: _keep_history(metrics), layout.world)
            if kept:
                say(f"set aside as {kept}")
        return newest
    if on_rank_zero(f"checkpoint.path {root} cannot be used", lambda: published_steps(root), layout.world):
        raise CheckpointError(
            f"checkpoint.resume is false, but {root} already holds checkpoints, which a later resume would mix up with this run's. "
            "Choose another logging.directory, delete them, or set checkpoint.resume=true"
        )
    return None


def _keep_history(metrics: Path) -> str | None:
    """Sets the numbers of a run aside that begins anew; returns where they are now, None when there are none."""
    if not metrics.is_file() or metrics.stat().st_size == 0:
        return None
    return str(rename_to_free(metrics, metrics.with_name(f"{metrics.name}.set_aside")))


def begin_phase(job: Job, built: RunConfig, layout: Layout, checkpoint: Path | None) -> tuple[Engine, Progress]:
    """Builds the model as `built`, the configuration of the phase's first stage, and continues from `checkpoint` or starts anew."""
    engine = create_engine(built, layout.device, layout)
    job.say(f"{layout.describe()} on {layout.device.type}, {num_parameters(job.config.model):,} parameters")
    for choice in engine.choices:
        job.say(choice)
    for label, (exchange, reason) in built.exchanges.items():
        job.say(f"`{label}` layers over {layout.cp_size} context ranks: {exchange}, because {reason}")
    return engine, start(job, engine, checkpoint)


def start(job: Job, engine: Engine, checkpoint: Path | None) -> Progress:
    """Where the run begins: the checkpoint, the weights of `model.init_from`, or fresh weights.

    A checkpoint of a run on other data is refused unless `checkpoint.other_data` accepts it.
    """
    config = job.config
    if checkpoint is not None:
        expected = job.identity if config.checkpoint.other_data == "refuse" else None
        plain = config.model_dump(mode="json")
        progress = load_checkpoint(checkpoint, engine, plain, expected)
        job.say(f"resumed from {checkpoint}: step {progress.step}, {progress.tokens:,} tokens")
        saved = on_rank_zero(f"checkpoint {checkpoint} cannot be read", lambda: read_manifest(checkpoint).config, engine.layout.world)
        for change in changed_values(saved, plain):
            job.say(f"changed since: {change}")
        return progress
    if config.model.init_from is not None:
        load_initial_weights(Path(config.model.init_from), config, engine)
        job.say(f"weights taken from {config.model.init_from}")
    return Progress()


def load_initial_weights(path: Path, config: RunConfig, engine: Engine) -> None:
    """Weights only, from a checkpoint of this project or from a directory that it exported to Hugging Face format."""
    if (path / "config.json").is_file():
        # Imported here: transformers takes seconds, and only this needs it.
        from nha_megatron.hf.import_ import load_hf_weights

        engine.load_weights(load_hf_weights(path, config.model))
    else:
        load_weights(resolve(path), engine)
