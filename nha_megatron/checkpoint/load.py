"""Reads a checkpoint: the newest sound one to resume a run from, or any one for its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import CheckpointException

from nha_megatron.checkpoint.changes import in_full
from nha_megatron.checkpoint.collective import on_rank_zero
from nha_megatron.checkpoint.files import LATEST, CheckpointError, prepare_root, published_steps, set_aside, step_directory
from nha_megatron.checkpoint.manifest import Manifest, read_manifest, verify
from nha_megatron.checkpoint.safety import require_plain_data
from nha_megatron.checkpoint.state import Progress, restore_rng, rng_for_loading
from nha_megatron.checkpoint.weights import CheckpointWeights
from nha_megatron.config.stages import begun_stages
from nha_megatron.data.identity import data_changes
from nha_megatron.engine.base import Engine

# What megatron-core and torch raise when a state dict does not fit the files. CheckpointException is a BaseException.
_MISFITS = (CheckpointException, CheckpointingException, KeyError, ValueError, AssertionError, RuntimeError)

# Settings that a run keeps for life: a change would continue another model, or other data, under the same curve.
_FIXED_IN_A_RUN = {
    "model": None,
    "data": ("sequence_length", "packing", "seed"),
    "training": ("global_batch_size", "precision"),
    "optimizer": ("betas", "eps", "weight_decay"),  # the optimizer's state brings its own
}
_FREE_IN_MODEL = ("init_from", "init_std")


def find_newest(root: Path, report: Callable[[str], None], group: dist.ProcessGroup, fresh: bool = False) -> Path | None:
    """The newest sound checkpoint below `root`, or None. Collective over `group`, all of whose ranks get the same answer.

    Leftovers of a crash are removed. Checkpoints that are damaged or unsafe to read are skipped, and `report`ed in one line each.
    When there are some and none is sound, raises `CheckpointError`; with `fresh` they are set aside instead, and the answer is None.
    """
    unusable = f"checkpoint.path {root} cannot be used"
    for warning in on_rank_zero(unusable, lambda: prepare_root(root), group):
        report(f"warning: {warning}")
    steps, has_latest = on_rank_zero(unusable, lambda: (published_steps(root), (root / LATEST).is_file()), group)
    problems = []
    for step in reversed(steps):
        directory = step_directory(root, step)
        try:
            verify(directory, group)
            on_rank_zero(f"checkpoint {directory} cannot be read", partial(_require_safe, directory), group)
            return directory
        except CheckpointError as error:
            problems.append(str(error))
            report(f"skipped: {error}")
    if not fresh and (steps or has_latest):
        raise CheckpointError(_none_loads(root, problems))
    for path in on_rank_zero(unusable, lambda: [*map(str, set_aside(root, steps))], group):
        report(f"set aside as {path}")
    return None


def _none_loads(root: Path, problems: list[str]) -> str:
    if problems:
        found = f"{root} holds {len(problems)} checkpoint{'s' * (len(problems) > 1)}, and none can be loaded: {'; '.join(problems[:3])}"
        found += " ..." if problems[3:] else ""
    else:
        found = f"{root} has a file `{LATEST}`, but no checkpoint: they were deleted, or lie where this machine does not see them"
    return (
        f"{found}. No checkpoint was changed. Put them back, make them readable, or choose another logging.directory; "
        "checkpoint.resume=fresh begins at step 0 and sets them aside"
    )


def load_checkpoint(directory: Path, engine: Engine, config: dict[str, Any], data: dict[str, Any] | None = None) -> Progress:
    """Continues a run: model, optimizer and random number generators of every rank, at any parallel layout. Collective.

    Args:
        data: what the run reads (`data_identity`); None takes any.

    Raises `CheckpointError` when the checkpoint belongs to another model, data order or data than these, or does not fit.
    """
    group = engine.layout.world
    manifest = on_rank_zero(f"checkpoint {directory} cannot be read", partial(_require_safe, directory), group)
    require_same_run(directory, manifest.config, config, manifest.step)
    if data is not None and manifest.data is not None:
        require_same_data(directory, manifest, data)
    state = engine.sharded_state_dict(is_loading=True)
    state["rng_state"] = rng_for_loading(manifest.world_size, engine.device, group)
    try:
        # RAISE_ALL: a tensor that only the checkpoint or only the model has is an error, not a default.
        loaded = dist_checkpointing.load(state, str(directory), strict=StrictHandling.RAISE_ALL)
        restore_rng(loaded.pop("rng_state"), engine.device, group)
        engine.load_state_dict(loaded)
    except _MISFITS as error:
        raise CheckpointError(f"checkpoint {directory} does not fit this model: {_reason(error)}") from error
    return Progress(manifest.step, manifest.tokens, manifest.guards or {})


def _require_safe(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    require_plain_data(directory)
    return manifest


def load_weights(directory: Path, engine: Engine) -> None:
    """Starts a new run from a checkpoint's weights: no optimizer state, no position. Collective.

    Raises `CheckpointError` or `ConfigError` unless the model takes every weight of the checkpoint, each with its shape,
    and the checkpoint has every weight of the model.
    """
    group = engine.layout.world
    verify(directory, group)
    weights = CheckpointWeights(directory)
    held: list[set[str]] = [set() for _ in range(group.size())]
    dist.all_gather_object(held, {name for name, _ in engine.named_parameters()}, group=group)
    wanted = set().union(*held)
    if wanted != set(weights):
        raise CheckpointError(
            f"the weights of checkpoint {directory} do not fit this model: the model has no place for {_few(set(weights) - wanted)}; "
            f"the checkpoint lacks {_few(wanted - set(weights))}. Compare the `model` sections of the two runs"
        )
    engine.load_weights(weights)


def require_same_run(directory: Path, saved: dict[str, Any], current: dict[str, Any], step: int = 0) -> None:
    """Raises `CheckpointError` listing the settings in which a run differs from the checkpoint, of step `step`, that it is to continue."""
    differences = []
    for section, names in _FIXED_IN_A_RUN.items():
        before, now = (in_full(section, config.get(section, {})) for config in (saved, current))
        for name in names or sorted(set(before) | set(now)):
            if section == "model" and name in _FREE_IN_MODEL:
                continue
            if before.get(name) != now.get(name):
                differences.append(f"{section}.{name} was {before.get(name)!r}, is {now.get(name)!r}")
    if not differences and begun_stages(saved, step) != begun_stages(current, step):
        differences.append(
            f"training.stages that have begun by step {step} were {begun_stages(saved, step)[1:]}, are {begun_stages(current, step)[1:]}"
        )
    if differences:
        raise CheckpointError(
            f"this run cannot continue from {directory}: {'; '.join(differences)}. "
            "Set them back, or start a new run in another logging.directory (model.init_from takes over the weights)"
        )


def require_same_data(directory: Path, manifest: Manifest, data: dict[str, Any]) -> None:
    """Raises `CheckpointError` when a stage that has begun by the checkpoint now reads other tokens, or in other shares."""
    assert manifest.data is not None
    try:
        changes = data_changes(manifest.data, data, stages=len(begun_stages(manifest.config, manifest.step)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {directory}: manifest.json is damaged: it does not say what was read ({error!r})") from error
    if changes:
        raise CheckpointError(
            f"this run cannot continue from {directory}, because its data is not what it was: {'; '.join(changes)}. Put the data back; or "
            f"let a stage of training.stages with from_tokens {manifest.tokens} bring the new data; or set checkpoint.other_data=accept to "
            "continue at the same position in it"
        )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


def _few(names: set[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
