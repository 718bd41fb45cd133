"""`nha-megatron check`: is this configuration right, and what does it amount to?"""

import argparse

from nha_megatron.cli.command import add_config_arguments
from nha_megatron.exit_status import COMPLETE

NAME = "check"
HELP = "validate a configuration and print what it amounts to; starts nothing"
EXAMPLE = "nha-megatron check run.yaml --world-size 8 parallel.context=4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the run (default: the fewest that fit)")
    parser.add_argument("--inputs", action="store_true", help="refuse when a file that the run reads is missing")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from nha_megatron.config import load_config
    from nha_megatron.config.inputs import require_inputs
    from nha_megatron.estimate.report import check_report

    config = load_config(arguments.config, arguments.overrides)
    report = check_report(config, arguments.world_size)
    if arguments.inputs:
        require_inputs(config)
    print(report)
    return COMPLETE
