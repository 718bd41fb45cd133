"""A run small enough for a test: two layers, a generated corpus, and what a test wants to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nha_megatron.checkpoint import load_weights_full
from nha_megatron.config import ConfigError, RunConfig, parse_config
from nha_megatron.data import TokenFileWriter
from nha_megatron.training.guards import TrainingError
from nha_megatron.training.metrics import read_metrics

VOCABULARY = 97


def write_corpus(folder: Path) -> None:
    """Token files `train` and `validation`: documents that count upwards in strides, so that there is something to learn."""
    random = np.random.default_rng(0)
    for name, documents in (("train", 40), ("validation", 10)):
        with TokenFileWriter(
            folder / name, vocab_size=VOCABULARY, end_of_text=0, tokenizer="none", tokenizer_sha256="0" * 64, source="generated"
        ) as writer:
            for _ in range(documents):
                start, stride, length = random.integers(1, 90), random.integers(1, 5), random.integers(20, 60)
                writer.add_document(np.append(1 + (start + stride * np.arange(length)) % (VOCABULARY - 1), 0))


def settings(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Plain configuration of a run in `folder/run` on the corpus in `folder`; `sections` replace single values."""
    base: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "num_slots": 4,
            "window": 4,
            "vocab_size": VOCABULARY,
        },
        "parallel": {},
        "data": {"path": str(folder / "train"), "validation": str(folder / "validation"), "sequence_length": 32},
        "training": {"steps": 6, "micro_batch_size": 1, "global_batch_size": 4, "device": "cpu"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every": 3},
        "logging": {"directory": str(folder / "run"), "tensorboard": False},
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return base


def config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return parse_config(settings(folder, **sections))


def pretrain_on_rank(plain: dict[str, Any]) -> str | None:
    """Program of the rank pool: the whole job. Returns the message it ended with, or None when it is complete."""
    from nha_megatron.training.run import pretrain

    try:
        pretrain(parse_config(plain))
    except (ConfigError, TrainingError) as error:
        return str(error)
    return None


def metrics(folder: Path, run: str = "run") -> list[dict[str, Any]]:
    return read_metrics(folder / run / "metrics.jsonl")


def losses(folder: Path, run: str = "run") -> list[float]:
    return [record["loss"] for record in metrics(folder, run)]


def weights(folder: Path, run: str = "run") -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    return load_weights_full(folder / run)
