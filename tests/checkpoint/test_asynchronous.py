"""A checkpoint written while training goes on is the one that training would have waited for, byte for byte."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.checkpoint import read_manifest, verify
from tests.checkpoint.programs import pretrain_until_signalled, save_twice, write_a_tensor_that_changes
from tests.distributed import RankPool
from tests.training import small_run

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {}, "fp32"),
    "dp2": (2, {}, "fp32"),
    "tp2_bf16": (2, {"tensor": 2}, "bf16"),
    "pp2": (2, {"pipeline": 2}, "fp32"),
}


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file of tensors and objects."""
    return {name: entry.sha256 for name, entry in verify(root / "step_2").files.items() if name.endswith((".distcp", ".pt"))}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name != "tp2_bf16")) for name in LAYOUTS])
def test_the_bytes_are_those_of_the_step_at_which_the_save_began(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    world, parallel, precision = LAYOUTS[layout]
    ranks.run(world, save_twice, root=str(tmp_path), parallel=parallel, precision=precision)
    files = contents(tmp_path / "waiting")
    assert len(files) == world + 1  # one of each rank, and common.pt
    assert contents(tmp_path / "background") == files


@pytest.mark.gpu
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=str)
def test_on_gpus(tmp_path: Path, parallel: dict[str, Any]) -> None:
    world = parallel.get("tensor", 1)
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    # In processes of their own: one that trained on the CPU keeps the workarounds for it.
    with closing(RankPool()) as gpu_ranks:
        gpu_ranks.run(world, save_twice, backend="nccl", root=str(tmp_path), parallel=parallel, device="cuda")
    assert contents(tmp_path / "background") == contents(tmp_path / "waiting")


def test_a_tensor_of_its_own_storage_is_copied(ranks: RankPool, tmp_path: Path) -> None:
    """Megatron itself copies views only. Without the copy, what training makes of the tensor meanwhile is written."""
    sums = []
    for name, copy in (("first", True), ("second", True), ("third", False)):
        (tmp_path / name).mkdir()
        sums += ranks.run(1, write_a_tensor_that_changes, directory=str(tmp_path / name), copy=copy)
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.slow  # tests/survival/ mixes both in one run
def test_a_run_with_asynchronous_checkpoints_is_the_same_run(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    for name, asynchronous in (("waiting", False), ("background", True)):
        plain = small_run.settings(
            tmp_path,
            parallel={"context": 2},
            checkpoint={"every": 2, "keep": 9, "asynchronous": asynchronous},
            logging={"directory": str(tmp_path / name)},
        )
        assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    assert small_run.losses(tmp_path, "background") == small_run.losses(tmp_path, "waiting")
    for step in (2, 4, 6):
        one, other = (read_manifest(tmp_path / name / "checkpoints" / f"step_{step}") for name in ("waiting", "background"))
        assert (one.step, one.tokens) == (other.step, other.tokens) == (step, step * 4 * 32)
        tensors = [name for name in one.files if name.endswith(".distcp")]
        assert len(tensors) == 2 and all(one.files[name] == other.files[name] for name in tensors)


def test_a_signal_waits_for_the_checkpoint_that_is_being_written(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, training={"steps": 100}, checkpoint={"every": 3, "keep": 9, "asynchronous": True})
    for message, said in ranks.run(2, pretrain_until_signalled, plain=plain, step=4):
        assert message is None
        assert [line.split(":")[0] for line in said] == ["step 3", "step 4"]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [verify(checkpoints / f"step_{step}").step for step in (3, 4)] == [3, 4]
    assert (checkpoints / "latest").read_text() == "step_4\n"
