"""What ranks run when a checkpoint moves through parallel layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nha_megatron.checkpoint import load_checkpoint, save_checkpoint
from nha_megatron.checkpoint.state import Progress
from nha_megatron.config import RunConfig
from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.training.schedule import learning_rate
from tests.engine.programs import make_engine, micro_batches, tiny_config

SCHEDULE = {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 3}


def update(engine: MegatronEngine, config: RunConfig, progress: Progress) -> tuple[float, float]:
    """The next update of the run: data and learning rate follow from the position alone. Returns loss and rate."""
    progress.step += 1
    lr = learning_rate(progress.step, config.optimizer, config.training.steps)
    loss = engine.train_step(micro_batches(config, engine.layout, progress.step), lr).loss
    progress.tokens += config.training.global_batch_size * config.data.sequence_length
    return loss, lr


def begin(root: str, parallel: dict[str, Any], **sections: Any) -> list[tuple[float, float]]:
    """Two updates, a checkpoint, three more updates."""
    config = tiny_config(parallel=parallel, optimizer=SCHEDULE, **sections)
    engine, progress = make_engine(config), Progress()
    curve = [update(engine, config, progress) for _ in range(2)]
    torch.rand(1 + dist.get_rank())  # a state of the generators that no seed gives
    save_checkpoint(Path(root), engine, progress, config.model_dump(mode="json"), keep=9)
    return curve + [update(engine, config, progress) for _ in range(3)]


def move(
    source: str, root: str, parallel: dict[str, Any], updates: int = 0, **sections: Any
) -> tuple[list[tuple[float, float]], set[float]]:
    """Loads, saves the same again, then makes `updates`. Returns their curve, and the steps that Adam counts after loading."""
    config = tiny_config(parallel=parallel, optimizer=SCHEDULE, **{**sections, "training": {**sections.get("training", {}), "seed": 99}})
    engine = make_engine(config)
    progress = load_checkpoint(Path(source), engine, config.model_dump(mode="json"))
    counted = {float(state["step"]) for part in engine.optimizer.chained_optimizers for state in part.optimizer.state.values()}
    save_checkpoint(Path(root), engine, progress, config.model_dump(mode="json"), keep=9)
    return [update(engine, config, progress) for _ in range(updates)], counted
