"""The generator of the self-contained modelling file."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nha_megatron.hf.families.nha.modeling_source import modeling_source
from nha_megatron.hf.inline import InliningError, inline
from nha_megatron.layers.registry import kind_named


def package(folder: Path, **modules: str) -> Path:
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder / "top.py"


def test_generated_file_imports_nothing_of_ours_outside_of_a_try() -> None:
    tree = ast.parse(modeling_source([kind_named("nha")]))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 0}
    imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    roots = {str(name).split(".")[0] for name in imported}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0}
    assert relative == {"configuration_nha"}


@pytest.mark.skipif(find_spec("ruff") is None, reason="needs ruff")
def test_generated_file_uses_no_undefined_or_redefined_name(tmp_path: Path) -> None:
    file = tmp_path / "modeling_nha.py"
    file.write_text(modeling_source([kind_named("nha")]))
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--target-version", "py311"]
    result = subprocess.run([*lint, str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_modules_stand_in_order_of_dependence_and_work_as_one(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        base='"""Base."""\n\nimport math\n\n\ndef half(x):\n    return math.floor(x / 2)  # rounds down\n',
        middle="import math\n\nfrom .base import half\n\nTABLE = [half(x) for x in range(4)]\nPI = math.pi\n",
        top="from .base import half\nfrom .middle import TABLE\n\n\ndef answer():\n    return half(9), TABLE\n\n\n__all__ = ['answer']\n",
    )
    host = '"""Host."""\n\nfrom __future__ import annotations\n\nfrom kernels import answer\n\n\ndef double():\n    return answer() * 2\n'
    text = inline(host, {"kernels": root}, optional="kernels")
    namespace: dict = {}
    exec(compile(text, "host", "exec"), namespace)  # `kernels` does not exist: the inlined source is used
    assert namespace["double"]() == (4, [0, 0, 1, 1]) * 2
    assert "# rounds down" in text, "comments are kept"
    assert text.count("import math") == 1 and "__all__" not in text and namespace["__doc__"] == "Host."


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"top": "from .base import f\n\ndef g():\n    pass\n", "base": "def f():\n    pass\n\ndef g():\n    pass\n"}, "both define g"),
        ({"top": "def g():\n    from .base import f\n", "base": "def f():\n    pass\n"}, "cannot be inlined"),
        ({"top": "from .base import f as h\n\ndef g():\n    pass\n", "base": "def f():\n    pass\n"}, "cannot be inlined"),
        ({"top": "from .base import f\n\ndef g():\n    pass\n", "base": "from .top import g\n\ndef f():\n    pass\n"}, "circle"),
        ({"top": "import torch as g2\n\ndef g():\n    pass\n", "base": ""}, "imports g2 from"),
        ({"top": "def other():\n    pass\n", "base": ""}, "do not define g"),
    ],
)
def test_source_that_cannot_become_one_module_is_refused(tmp_path: Path, modules: dict[str, str], message: str) -> None:
    root = package(tmp_path, **modules)
    host = '"""Host."""\n\nimport math as g2\n\nfrom kernels import g\n\n\ndef use():\n    return g, g2\n'
    with pytest.raises(InliningError, match=message):
        inline(host, {"kernels": root}, optional="kernels")
