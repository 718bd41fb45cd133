"""The GPU check of kernels/benchmarks/check.py, case by case. It needs a CUDA device; most of its time is compiling."""

import pathlib
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: there are no kernels to check")

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "kernels/benchmarks"))  # a folder of programs, no package
import check


@pytest.mark.gpu
@pytest.mark.parametrize("case", check.all_cases(), ids=lambda case: case.name)
def test_equals_float64(case: object) -> None:
    result = check.check(case)
    if "refused" in result:
        pytest.skip(result["refused"])
    assert result["passed"], result
