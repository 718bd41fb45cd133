"""What a subcommand is, and how one is parsed, run and reported."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nha_megatron.config import ConfigError, OneRankError
from nha_megatron.exit_status import FAILED, INTERRUPTED, USER_ERROR

# What a path or the machine is to blame for wherever it happens: the system's words and the file say all there is to know.
_OF_THE_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


class Command(Protocol):
    """A module of this folder. It is imported for every call of every subcommand: what takes time is imported in `run`."""

    NAME: str
    HELP: str
    """One line of the overview."""
    EXAMPLE: str
    """Complete command lines, shown by --help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Arguments and options."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Does the work; returns the exit status (`nha_megatron.exit_status`). Raises `ConfigError` for a user's mistake."""


def run_command(command: Command, argv: Sequence[str], program: str) -> int:
    """Parses and runs one subcommand. `program`: how the user called it."""
    parser = argparse.ArgumentParser(prog=program, formatter_class=argparse.RawDescriptionHelpFormatter)
    describe(parser, command)
    # Intermixed: overrides may stand before and after options.
    arguments, rest = parser.parse_known_intermixed_args(argv)
    if rest and rest[0].startswith("-"):
        hint = "; overrides are written section.key=value" if hasattr(arguments, "overrides") else ""
        parser.error(f"unknown option {rest[0]}{hint}")
    if rest:
        parser.error(f"{rest[0]!r} is one argument too many")
    return run_and_report(command.run, arguments)


def describe(parser: argparse.ArgumentParser, command: Command) -> None:
    """Gives a parser the subcommand's arguments and help."""
    parser.description = f"{command.HELP[0].upper()}{command.HELP[1:]}."
    parser.epilog = "example:\n" + "\n".join(f"  {line}" for line in command.EXAMPLE.splitlines())
    command.add_arguments(parser)


def run_and_report(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Exit status of `run`; a user's mistake is one message and status 2."""
    try:
        return run(arguments)
    except ConfigError as error:
        report_error(error)
        return USER_ERROR
    except OSError as error:
        if error.errno not in (*_OF_THE_USER, *_OF_THE_MACHINE):
            raise
        report_error(OneRankError(f"{error.strerror}: {error.filename}" if error.filename else str(error)))
        return USER_ERROR if error.errno in _OF_THE_USER else FAILED
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def report_error(error: Exception) -> None:
    """One message for all ranks: rank 0 prints it, unless another rank alone knows of it."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, OneRankError) and "RANK" in os.environ:
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        # Launchers end all ranks when the first one fails: leave rank 0 the time to print.
        time.sleep(2)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG.yaml and overrides."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="run configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file, e.g. training.steps=100")
