"""A finished run of two ranks, made once: four steps, checkpoints after steps 2 and 4."""

import shutil
from pathlib import Path

import pytest

from tests.distributed import RankPool
from tests.training import small_run


@pytest.fixture(scope="package")
def finished_run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small_run.write_corpus(folder)
    plain = small_run.settings(folder, training={"steps": 4}, checkpoint={"every": 2}, parallel={"tensor": 2})
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    return folder


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run and its corpus that a test may damage."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return tmp_path
