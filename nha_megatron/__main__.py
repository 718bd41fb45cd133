"""Command line: `python -m nha_megatron check|pretrain|health CONFIG.yaml [key=value ...]` and `verify DIR`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from nha_megatron.config import ConfigError, OneRankError, load_config
from nha_megatron.config.inputs import require_inputs
from nha_megatron.estimate.report import check_report
from nha_megatron.exit_status import COMPLETE, FAILED, GIVEN_UP, STOPPED, USER_ERROR, pass_on
from nha_megatron.known_warnings import silence_known_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (`nha_megatron.exit_status`)."""
    arguments = _parse(argv)
    try:
        status: int = arguments.command(arguments)
    except ConfigError as error:
        _report(error)
        return USER_ERROR
    return status


def _check(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    report = check_report(config, arguments.world_size)
    if arguments.inputs:
        require_inputs(config)
    print(report)
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
        stopped_by = pretrain(config)
    except TrainingError as error:
        _report(error)
        return pass_on(GIVEN_UP)
    return pass_on(STOPPED if stopped_by else COMPLETE)


def _health(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    config.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    silence_known_warnings()
    from nha_megatron.launch.health import check_health

    return pass_on(COMPLETE if check_health(config) else FAILED)


def _verify(arguments: argparse.Namespace) -> int:
    silence_known_warnings()
    from nha_megatron.checkpoint import VerifyReport

    report = VerifyReport(arguments.directory)
    for line in report:
        print(line, flush=True)
    return COMPLETE if report.is_sound else FAILED


def _report(error: Exception) -> None:
    """One message for all ranks: rank 0 prints it, unless another rank alone knows of it."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, OneRankError) and "RANK" in os.environ:
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # Launchers end all ranks when the first one fails: leave rank 0 the time to print.
        time.sleep(2)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nha_megatron", description="Pretrain Native Hybrid Attention language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="validate a configuration and print what it amounts to; starts nothing")
    check.add_argument("--world-size", type=int, metavar="N", help="ranks of the run (default: the fewest that fit)")
    check.add_argument("--inputs", action="store_true", help="refuse when a file that the run reads is missing")
    check.set_defaults(command=_check)
    pretrain = commands.add_parser("pretrain", help="train; run it under torchrun or another launcher for several ranks")
    pretrain.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it; LOCAL_RANK says the same
    pretrain.set_defaults(command=_pretrain)
    health = commands.add_parser("health", help="test devices, network, disk and clocks of all nodes; run it under the same launcher")
    health.set_defaults(command=_health)
    verify = commands.add_parser(
        "verify",
        help="read all checkpoints of a run, or one, and say which are sound",
        epilog="Exit status: 0 all are sound, 1 one is damaged, 2 there is none.",
    )
    verify.add_argument("directory", metavar="DIR", help="a run's folder, a checkpoints folder or a checkpoint")
    verify.set_defaults(command=_verify, overrides=[])
    for command in (check, pretrain, health):
        command.add_argument("config", metavar="CONFIG.yaml", help="run configuration")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file, e.g. training.steps=100"
        )

    # argparse stops collecting overrides at the first option: take those that follow it too.
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; overrides are written section.key=value")
    if rest and arguments.command is _verify:
        parser.error(f"verify takes one directory, given another argument {rest[0]}")
    arguments.overrides += rest
    return arguments


if __name__ == "__main__":
    sys.exit(main())
