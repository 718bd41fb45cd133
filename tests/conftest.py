"""Fixtures shared by all tests: one thread per process, poisoned uninitialised memory, and the pool of gloo ranks."""

import os
import shutil
import tempfile

# Before torch is imported: the ranks inherit it, and two cores are shared by up to eight of them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Before transformers is imported: one folder of its own for the code of exported models, for all tests, as it stays in sys.path.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")

from collections.abc import Iterator

import pytest
import torch

from tests.distributed import RankPool, poison_uninitialised_memory


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    poison_uninitialised_memory()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(world_size, function, **kwargs)` -> one result per rank. See tests/distributed.py."""
    pool = RankPool()
    yield pool
    pool.close()
