"""What the ranks run in the tests of the Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha_megatron.checkpoint import Progress, save_checkpoint
from nha_megatron.config import ModelConfig, RunConfig, parse_config
from nha_megatron.engine.layout import create_layout
from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.model.build import build_model
from nha_megatron.model.initialize import initialize_weights

CPU = torch.device("cpu")


def run_config(model: ModelConfig, **sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": model.model_dump(mode="json"),
        "parallel": {},
        "data": {"path": "unused", "sequence_length": 32},
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 4, "device": "cpu"},
        "optimizer": {"lr": 1e-3},
        "logging": {"directory": "unused"},
    }
    for section, fields in sections.items():
        base[section].update(fields)
    return parse_config(base)


def gpt_logits(model: ModelConfig, tokens: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Logits [B, T, padded vocabulary] of a GPTModel on one rank, with these weights or those of a new run.

    `weights` must name exactly the parameters of the GPTModel.
    """
    config = run_config(model)
    layout = create_layout(config, CPU)
    (gpt,) = build_model(config, CPU, layout.groups)
    initialize_weights([gpt], model, config.training.seed, layout.tp_rank, layout.tp_size)
    if weights is not None:
        given = gpt.load_state_dict(weights, strict=False)
        assert not given.unexpected_keys and all("_extra_state" in name for name in given.missing_keys), given
    with torch.no_grad():
        return gpt.eval()(tokens, position_ids=None, attention_mask=None)


def save_new_run(model: ModelConfig, root: Path, identity: dict[str, Any] | None = None, **sections: dict[str, Any]) -> None:
    """A checkpoint of a run that has not trained yet, at the parallel layout of `sections`; `identity` is what it knows of its data."""
    config = run_config(model, **sections)
    engine = MegatronEngine(config, CPU, create_layout(config, CPU))
    save_checkpoint(root, engine, Progress(), config.model_dump(mode="json"), keep=1, data=identity)
