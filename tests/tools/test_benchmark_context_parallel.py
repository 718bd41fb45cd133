"""`tools/benchmark_context_parallel.py` on two gloo ranks: it checks, times and counts every kind of layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_context_parallel.py"
SIZES = {"tokens-per-rank": 32, "heads": 4, "kv-heads": 2, "head-dim": 8, "slots": 4, "repeats": 3, "hidden-size": 16, "check-tokens": 24}
SMALL = ["--dtype", "float32", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]


def launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(TOOL), *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "bytes_sent"),
    [
        # Halo of 6 tokens: keys and values of 8 channels and 4 log-gates for 2 heads; one piece of slots: 1 + 16 channels.
        (["--window", "6"], 6 * 2 * (2 * 8 + 4) * 4 + 2 * 4 * 17 * 4),
        # Half of q, k, v and outputs of 32 tokens: 12 heads of 8 channels.
        pytest.param(["--window", "full"], 32 * 12 * 8 * 4 // 2, marks=pytest.mark.slow),
        # Keys and values of 32 tokens, queries and outputs of 16.
        pytest.param(["--window", "full", "--cp-comm-type", "all_gather"], (32 * 4 + 16 * 8) * 8 * 4, marks=pytest.mark.slow),
    ],
    ids=["window", "heads", "gathered"],
)
def test_a_row_for_every_length(tmp_path: Path, arguments: list[str], bytes_sent: int) -> None:
    done = launch(*arguments, "--output", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ranks"] == 2 and result["difference_from_one_rank"] < 5e-6
    assert result["environment"]["device"] == "cpu" and "--window" in result["environment"]["command"]
    (row,) = result["rows"]
    assert row["tokens_per_rank"] == 32 and row["bytes_sent"] == bytes_sent
    assert row["one_rank_ms"] > 0 and row["all_ranks_ms"] > 0
    assert row["efficiency"] == pytest.approx(row["one_rank_ms"] / row["all_ranks_ms"])
    if "full" not in arguments:
        assert row["sending_ms"] == pytest.approx(row["all_ranks_ms"] - row["without_sending_ms"])
    assert 0 < len(result["kernels"]) <= 25 and result["kernels"][0]["ms"] > 0


def test_without_torchrun_it_says_how_to_start() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run([sys.executable, str(TOOL)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "torchrun --nproc-per-node=2" in done.stderr
