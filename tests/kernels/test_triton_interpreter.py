"""Kernel arithmetic on the CPU. The cases, and what they compare, are in triton_interpreter_cases.py."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: the kernels' arithmetic is not tested here")


def test_kernels_equal_the_torch_backend() -> None:
    cases = pathlib.Path(__file__).with_name("triton_interpreter_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
