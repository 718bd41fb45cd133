"""Kill -9 on GPUs: what test_kill.py shows on the CPU holds over CUDA and NCCL, where the state that is written comes from the devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nha_megatron.checkpoint import VerifyReport
from tests.optional import needs_deepspeed
from tests.survival.test_kill import kill_and_resume, kill_under_torchrun
from tests.training import small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

CASES = [
    ("megatron", "tp2"),
    pytest.param("zero1", "dp2", marks=needs_deepspeed),
    pytest.param("zero2", "cp2", marks=needs_deepspeed),
    pytest.param("zero3", "dp2", marks=needs_deepspeed),
]


@pytest.mark.parametrize(("engine", "layout"), CASES)
def test_two_kills(tmp_path: Path, engine: str, layout: str) -> None:
    kill_and_resume(tmp_path, 30, kills=2, engine=engine, layout=layout, device="cuda", precision="bf16")


@pytest.mark.parametrize("engine", ["megatron", pytest.param("zero2", marks=needs_deepspeed)])
def test_torchrun_starts_the_ranks_again(tmp_path: Path, engine: str) -> None:
    kill_under_torchrun(tmp_path, engine, steps=20, kills=2, device="cuda", precision="bf16")
    assert [record["step"] for record in small_run.metrics(tmp_path, "killed")] == list(range(1, 21))
    report = VerifyReport(tmp_path / "killed")
    said = list(report)
    assert report.is_sound and said[-1] == "a run would continue from step_20", said
