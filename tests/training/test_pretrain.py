"""The whole job, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nha_megatron.checkpoint import verify
from nha_megatron.config import load_config
from tests.distributed import RankPool
from tests.training import small_run

RECORD = {"step", "tokens", "loss", "grad_norm", "lr", "skipped", "time", "step_seconds", "epoch", "tokens_per_second", "memory"}
RECORD |= {"slowest_rank", "slowest_host", "slowest_ratio"}  # every logging interval, here every step

PATIENCE_S = 600  # on a machine that is busy with other tests


def launch(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "nha_megatron", "pretrain", str(folder / "run.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE_S)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_torchrun_stopped_by_a_signal_and_started_again(tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(
        tmp_path,
        parallel={"context": 2},
        training={"steps": 100000},
        optimizer={"schedule": "constant"},
        checkpoint={"every": 100000},
        logging={"tensorboard": True},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    job = launch(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert "stopped by SIGTERM after step" in output, output
    steps = len(small_run.metrics(tmp_path))
    manifest = verify(tmp_path / "run" / "checkpoints" / f"step_{steps}")
    assert (manifest.step, manifest.world_size) == (steps, 2)

    total = steps + 2
    job = launch(tmp_path, f"training.steps={total}", "training.validate_every=1", "logging.layer_statistics=1")
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, output
    assert f"resumed from {tmp_path}/run/checkpoints/step_{steps}" in output
    records = small_run.metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, total + 1))
    assert set(records[0]) == RECORD
    assert set(records[-1]) == RECORD | {"validation_loss", "slot_share", "mean_decay", "write_strength"}
    assert all(len(records[-1][name]) == 2 for name in ("slot_share", "mean_decay", "write_strength"))
    assert records[-1]["tokens"] == total * 4 * 32
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{total}\n"
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert resolved == load_config(
        tmp_path / "run.yaml", [f"training.steps={total}", "training.validate_every=1", "logging.layer_statistics=1"]
    )


def test_layer_statistics_do_not_depend_on_the_layout(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "tp2": (2, {"tensor": 2}),
        "pp2": (2, {"pipeline": 2}),
        "cp2": (2, {"context": 2}),
    }
    for name, (world, parallel) in layouts.items():
        sections = {"parallel": parallel, "training": {"steps": 2}, "logging": {"directory": str(tmp_path / name), "layer_statistics": 1}}
        assert ranks.run(world, small_run.pretrain_on_rank, plain=small_run.settings(tmp_path, **sections)) == [None] * world
    reference = small_run.metrics(tmp_path, "one")[0]
    assert all(0 < share < 1 for share in reference["slot_share"])
    for name in ("tp2", "pp2", "cp2"):
        record = small_run.metrics(tmp_path, name)[0]
        for statistic in ("slot_share", "mean_decay", "write_strength"):
            # Means over the same tokens and heads, summed in another order: a few roundings of fp32.
            assert record[statistic] == pytest.approx(reference[statistic], rel=1e-5), (name, statistic)


@pytest.mark.parametrize(("packing", "tokens"), [("concat", 32), ("best_fit", 96)])
def test_isolated_documents_of_token_files_train_alike_over_context_ranks(
    ranks: RankPool, tmp_path: Path, packing: str, tokens: int
) -> None:
    """Documents of 20 to 60 tokens. In rows of 32 most of them lie on both ranks, or begin in a row and end in the next; in rows of 96
    they are packed whole, and the rest is padding."""
    small_run.write_corpus(tmp_path)
    training = {"steps": 3, "micro_batch_size": 2}
    for name, world in (("one", 1), ("two", 2)):
        plain = small_run.settings(
            tmp_path,
            data={"packing": packing, "sequence_length": tokens},
            training=training,
            parallel={"context": world},
            logging={"directory": str(tmp_path / name), "layer_statistics": 1},
        )
        assert ranks.run(world, small_run.pretrain_on_rank, plain=plain) == [None] * world
    for one, two in zip(small_run.metrics(tmp_path, "one"), small_run.metrics(tmp_path, "two"), strict=True):
        assert two["tokens"] == one["tokens"]
        for name in ("loss", "slot_share", "mean_decay", "write_strength"):
            # fp32 sums in another order, and what three updates of Adam make of them.
            assert two[name] == pytest.approx(one[name], rel=5e-5), (one["step"], name)


def test_a_vocabulary_too_small_for_the_data_is_refused_before_training(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    message = ranks.run(1, small_run.pretrain_on_rank, plain=small_run.settings(tmp_path, model={"vocab_size": 50}))[0]
    assert "model.vocab_size is 50" in message
    assert not (tmp_path / "run").exists()
