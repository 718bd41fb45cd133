"""Kernel arithmetic on the CPU. The cases, and what they compare, are in the files named here."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: the kernels' arithmetic is not tested here")


@pytest.mark.parametrize(
    "file",
    ["attention_cases.py", "wide_window_cases.py", "continuation_cases.py", "decode_cases.py", "summary_cases.py"],
)
def test_kernels_equal_plain_pytorch(file: str) -> None:
    cases = pathlib.Path(__file__).parent / "interpreter" / file
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
