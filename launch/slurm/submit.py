#!/usr/bin/env python3
"""Submit a run to SLURM: launch/slurm/submit.py CONFIG.yaml --nodes N --time H:MM:SS [--site FILE] [section.key=value ...]

Checks configuration, layout and files first; freezes code and configuration in the run's folder; writes and submits the job
script; prints how to follow, stop and resume.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from nha_megatron.config import ConfigError  # noqa: E402
from nha_megatron.exit_status import COMPLETE, USER_ERROR  # noqa: E402
from nha_megatron.launch.submit import submit  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml", help="run configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--time", required=True, metavar="H:MM:SS", help="time limit of one job, as SLURM writes it")
    parser.add_argument("--site", metavar="FILE", help="site file; examples in launch/slurm/sites/")
    parser.add_argument("--name", help="name of the job (default: name of the run's folder)")
    parser.add_argument("--launcher", choices=("torchrun", "deepspeed"), default="torchrun")
    parser.add_argument("--chain", type=int, default=1, metavar="K", help="K jobs one after the other, where requeue is not allowed")
    parser.add_argument("--no-health", action="store_true", help="do not test the nodes before training")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the job script; write and submit nothing")
    arguments = parser.parse_intermixed_args()
    try:
        print(submit(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
