"""`nha-megatron verify`: which checkpoints can be trusted?"""

import argparse

from nha_megatron.exit_status import COMPLETE, FAILED

NAME = "verify"
HELP = "read all checkpoints of a run, or one, and say which are sound (status 0: all are, 1: one is damaged, 2: there is none)"
EXAMPLE = "nha-megatron verify runs/my-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a run's folder, a checkpoints folder or a checkpoint")


def run(arguments: argparse.Namespace) -> int:
    from nha_megatron.known_warnings import silence_known_warnings

    silence_known_warnings()
    from nha_megatron.checkpoint import VerifyReport

    report = VerifyReport(arguments.directory)
    for line in report:
        print(line, flush=True)
    return COMPLETE if report.is_sound else FAILED
