"""Every collective of the library is told its process group: groups are arguments, never globals.

A call that leaves the group out would run over all ranks, and wait for ever where only some of them come by.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "nha_megatron", ROOT / "kernels" / "nha_kernels")

COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "P2POp",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
}
PLACES = {"get_rank", "get_world_size"}

# The health check makes a group of its own before there is a layout; the layout is where groups come from.
ALLOWED = {"nha_megatron/cluster/health.py", "nha_megatron/engine/layout.py"}


def over_the_default_group(source: str) -> Iterator[str]:
    """Lines of a module that use torch.distributed's default group, as `line: what`."""
    tree = ast.parse(source)
    modules, functions = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname or name.name for name in node.names if name.name == "torch.distributed"}
        elif isinstance(node, ast.ImportFrom):
            if node.module == "torch":
                modules |= {name.asname or name.name for name in node.names if name.name == "distributed"}
            elif (node.module or "").startswith("torch.distributed"):
                functions |= {name.asname or name.name: name.name for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "WORLD":
            yield f"{node.lineno}: {ast.unparse(node)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        name = name if module in {*modules, "torch.distributed"} else functions.get(called, "")
        told = any(keyword.arg == "group" for keyword in node.keywords)
        if (name in COLLECTIVES and not told) or (name in PLACES and not told and not node.args):
            yield f"{node.lineno}: {called}"


def test_every_collective_is_told_its_group() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in package.rglob("*.py")}
    assert len(files) > 100 and files.keys() >= ALLOWED
    found = [f"{name}:{line}" for name, path in files.items() if name not in ALLOWED for line in over_the_default_group(path.read_text())]
    assert not found


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", True),
        ("import torch.distributed as dist\ndist.all_reduce(x, group=group)", False),
        ("import torch.distributed as dist\ndist.all_reduce(x, group=dist.group.WORLD)", True),
        ("import torch\ntorch.distributed.barrier()", True),
        ("from torch import distributed\ndistributed.barrier()", True),
        ("from torch.distributed import barrier as meet\nmeet()", True),
        ("import torch.distributed as dist\ndist.get_rank()", True),
        ("import torch.distributed as dist\ndist.get_rank(group)", False),
        ("import torch\ntorch.gather(x, 0, index)", False),
    ],
)
def test_what_counts_as_the_default_group(line: str, is_found: bool) -> None:
    assert bool(list(over_the_default_group(line))) == is_found
