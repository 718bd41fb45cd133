"""How the rooms may know each other: no module imports in a circle, nothing imports upwards, and layer kinds are asked, not known."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"nha_megatron": ROOT / "nha_megatron", "nha_kernels": ROOT / "kernels" / "nha_kernels"}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, everywhere: bool) -> set[str]:
    """Modules of ours that a module imports: when it is loaded and for its types, or anywhere in it."""
    file = modules()[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else _when_loaded(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {name if name in modules() else base for name in (f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in modules() and name != module}


def _when_loaded(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            for part in (node.body, node.orelse, *(handler.body for handler in getattr(node, "handlers", []))):
                yield from _when_loaded(part)


def test_no_module_imports_in_a_circle_not_even_for_types() -> None:
    # The public names of the package itself point at what they name; nothing of ours imports them.
    graph = {module: imports(module, everywhere=False) for module in modules() if module != "nha_megatron"}
    remaining = {module: targets - {"nha_megatron"} for module, targets in graph.items()}
    while leaves := [module for module, targets in remaining.items() if not targets]:
        for leaf in leaves:
            del remaining[leaf]
        remaining = {module: targets - set(leaves) for module, targets in remaining.items()}
    assert not remaining, f"among these modules there is a circle: {sorted(remaining)}"


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("nha_kernels", ["nha_megatron"]),
        ("nha_megatron.config", ["estimate", "model", "engine", "training", "checkpoint", "hf", "cli"]),
        ("nha_megatron.layers", ["estimate", "model", "engine", "training", "checkpoint", "hf", "data", "cli"]),
        ("nha_megatron.estimate", ["model", "engine", "training", "checkpoint", "hf", "cli"]),
        ("nha_megatron.data", ["model", "engine", "training", "checkpoint", "hf", "cli"]),
        ("nha_megatron.model", ["engine", "training", "checkpoint", "hf", "cli"]),
        ("nha_megatron.engine", ["training", "checkpoint", "hf", "cli"]),
        ("nha_megatron.checkpoint", ["training", "hf", "cli"]),
    ],
)
def test_nothing_imports_upwards(room: str, never: list[str]) -> None:
    forbidden = tuple(name if name.startswith("nha_") else f"nha_megatron.{name}" for name in never)
    inside = [module for module in modules() if (module + ".").startswith(room + ".")]
    assert inside
    wrong = [
        f"{module} imports {target}"
        for module in inside
        for target in imports(module, everywhere=True)
        if any((target + ".").startswith(name + ".") for name in forbidden)
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["model", "estimate", "training", "engine", "checkpoint", "data", "hf"])
def test_layer_kinds_are_asked_and_not_known(room: str) -> None:
    """What belongs to NHA stands in layers/nha/, and what writes this project's own Hugging Face model in hf/families/nha/."""
    of_nha = re.compile(r"\bnha\b(?!-megatron)|NativeHybrid|num_slots|slot_share|empty_slots|linear_gate|\.window\b", re.IGNORECASE)
    for file in (PACKAGES["nha_megatron"] / room).rglob("*.py"):
        if "families" in file.parts:
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not of_nha.search(line.replace("hf.families.nha.", "")), (
                f"{file.relative_to(ROOT)}:{number} knows a layer kind: {line.strip()}"
            )


@pytest.mark.parametrize("module", ["nha_megatron.layers.nha.config", "nha_megatron.layers.nha.cost", "nha_megatron.layers.nha.kind"])
def test_configuration_and_costs_of_a_kind_load_no_torch_and_of_the_configuration_its_base(module: str) -> None:
    program = f"import {module}, sys; print(*(name for name in sys.modules if name == 'torch' or name.startswith('nha_megatron.config.')))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= {"nha_megatron.config.base", "nha_megatron.config.errors", "nha_megatron.config.renamed"}
