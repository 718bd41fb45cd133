"""The check of the token files when a run starts: one process of each node reads, all ranks learn what it found."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from nha_megatron.config import ConfigError, RunConfig
from nha_megatron.data.verify import CheckedFile, Depth, verify_data
from nha_megatron.engine.environment import local_rank
from nha_megatron.engine.layout import Layout

_POLL_S = 0.2


def check_data(config: RunConfig, layout: Layout, say: Callable[[str], None]) -> list[CheckedFile]:
    """Compares the token files with their checksums (data/verify.py); returns what was checked, on ranks that read. Collective.

    Every node may have a copy of its own, so the first process of each node reads. Raises `ConfigError` on all ranks when one of them
    finds a file that is not what was prepared, or cannot be read.
    """
    reads = local_rank(layout.rank) == 0
    files: list[CheckedFile] = []
    problem: str | None = None
    with ThreadPoolExecutor(1) as reader:
        work = reader.submit(verify_data, config) if reads else None
        # No collective waits for the reading, which may take longer than a collective is allowed to.
        while not _all_ranks(work is None or work.done(), layout):
            time.sleep(_POLL_S)
        if work is not None:
            try:
                files = work.result()
            except ConfigError as error:
                problem = str(error)
            except OSError as error:  # raised here it would leave the other ranks in the gather below
                problem = f"token files cannot be read: {error}; check data.path, data.validation and their permissions"
    problems: list[str | None] = [None] * layout.world_size
    dist.all_gather_object(problems, problem, group=layout.world)
    found = next((problem for problem in problems if problem is not None), None)
    if found is not None:
        raise ConfigError(found)
    say(_summary(files))
    return files


def describe_checked(config: RunConfig, files: list[CheckedFile]) -> str:
    """The text of data.json."""
    return json.dumps({"verify": config.data.verify, "files": [file._asdict() for file in files]}, indent=1) + "\n"


def _all_ranks(done: bool, layout: Layout) -> bool:
    flag = torch.tensor([int(done)], dtype=torch.int32, device=layout.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=layout.world)
    return bool(flag.item())


def _summary(files: list[CheckedFile]) -> str:
    depths = Counter(file.checked for file in files)
    words: dict[Depth, str] = {"full": "in full", "sampled": "by samples", "sizes": "by size only"}
    detail = ", ".join(f"{depths[depth]} {text}" for depth, text in words.items() if depths[depth])
    return f"data: {len(files)} token files, {sum(file.bytes for file in files) / 2**30:.2f} GiB, compared with their checksums: {detail}"
