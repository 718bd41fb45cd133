"""The GPU check of kernels/benchmarks/check.py, case by case. It needs a CUDA device; most of its time is compiling."""

import importlib.util
import pathlib
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: there are no kernels to check")

_PATH = pathlib.Path(__file__).parents[2] / "kernels/benchmarks/check.py"
_SPEC = importlib.util.spec_from_file_location("nha_gpu_check", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
check = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = check  # dataclasses look their module up
_SPEC.loader.exec_module(check)


@pytest.mark.gpu
@pytest.mark.parametrize("case", check.cases(), ids=lambda case: case.name)
def test_equals_float64(case: object) -> None:
    result = check.check(case)
    if "refused" in result:
        pytest.skip(result["refused"])
    assert result["passed"], result
