#!/usr/bin/env python3
"""The same as `nha-megatron submit`, with the code of this checkout: launch/slurm/submit.py --help describes it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from nha_megatron.cli import submit  # noqa: E402
from nha_megatron.cli.command import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command(submit, sys.argv[1:], "submit.py"))
