"""The GPU check of kernels/benchmarks/check.py, case by case; most of its time is compiling. Without a GPU: its cases are dispatched."""

import pathlib
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there are no kernels to check")

sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / "kernels/benchmarks"))  # a folder of programs, no package
import check
import check_cases

from nha_kernels.triton.dispatch import refusal_of_device, refusal_of_shape

CASES = check.all_cases()
WITH_SLOTS = [case for case in check_cases.cases() if case.window is not None or case.memory]  # others run no kernel of ours


@pytest.mark.parametrize("case", WITH_SLOTS, ids=lambda case: case.name)
def test_no_case_is_refused(case: check_cases.Case) -> None:
    """A refused case would compare nothing."""
    q, k, v, g = check_cases.shapes(case)
    assert refusal_of_shape(q, k, v, g) is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_float64(case: object) -> None:
    reason = refusal_of_device(torch.empty(0, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    result = check.check(case)
    assert result["passed"] and "refused" not in result, result
