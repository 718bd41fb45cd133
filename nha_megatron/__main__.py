"""Command line: `python -m nha_megatron check|pretrain CONFIG.yaml [key=value ...]`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from nha_megatron.config import ConfigError, load_config
from nha_megatron.config.inputs import require_inputs
from nha_megatron.config.report import check_report
from nha_megatron.known_warnings import silence_known_warnings

TRAINING_FAILED = 1
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or after one message 2 (a user's mistake) or 1 (the numbers of the run failed)."""
    arguments = _parse(argv)
    try:
        status: int = arguments.command(arguments)
    except ConfigError as error:
        _report(error)
        return USER_ERROR
    return status


def _check(arguments: argparse.Namespace) -> int:
    print(check_report(load_config(arguments.config, arguments.overrides), arguments.world_size))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    # Everything that can be refused without torch is refused before it is loaded.
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    require_inputs(config)
    silence_known_warnings()
    from nha_megatron.training.guards import TrainingError
    from nha_megatron.training.run import pretrain

    try:
        pretrain(config)
    except TrainingError as error:
        _report(error)
        return TRAINING_FAILED
    return 0


def _report(error: Exception) -> None:
    """One message for all ranks: rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # Launchers end all ranks when the first one fails: leave rank 0 the time to print.
        time.sleep(2)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nha_megatron", description="Pretrain Native Hybrid Attention language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="validate a configuration and print what it amounts to; starts nothing")
    check.add_argument("--world-size", type=int, metavar="N", help="ranks of the run (default: the fewest that fit)")
    check.set_defaults(command=_check)
    pretrain = commands.add_parser("pretrain", help="train; run it under torchrun or another launcher for several ranks")
    pretrain.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it; LOCAL_RANK says the same
    pretrain.set_defaults(command=_pretrain)
    for command in (check, pretrain):
        command.add_argument("config", metavar="CONFIG.yaml", help="run configuration")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file, e.g. training.steps=100"
        )

    # argparse stops collecting overrides at the first option: take those that follow it too.
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; overrides are written section.key=value")
    arguments.overrides += rest
    return arguments


if __name__ == "__main__":
    sys.exit(main())
