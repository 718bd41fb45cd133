"""`nha-megatron COMMAND ...`, also as `python -m nha_megatron COMMAND ...`."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence

import nha_megatron
from nha_megatron.cli import check, example, export, generate, health, prepare, pretrain, submit, train_tokenizer, verify
from nha_megatron.cli.command import Command, run_command

PROGRAM = "nha-megatron"
COMMANDS: dict[str, Command] = {
    # in the order in which a user meets them
    command.NAME: command
    for command in (example, train_tokenizer, prepare, check, pretrain, health, submit, verify, export, generate)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (`nha_megatron.exit_status`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks is no reason to end
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in COMMANDS:
        try:
            return run_command(COMMANDS[name], words[1:], f"{PROGRAM} {name}")
        finally:
            _let_go_of_output()
    parser = overview()
    if name.startswith("-"):
        parser.parse_args(words)  # --help, --version, or an option that it refuses
    if not name:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    parser.error(f"unknown command {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(COMMANDS)}"))


def _let_go_of_output() -> None:
    """A console that takes no more (a full disk, a closed pipe) would turn the exit status into Python's 120."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def overview() -> argparse.ArgumentParser:
    """The parser of a line without a command: its help lists them."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.HELP}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description="Pretrain Native Hybrid Attention language models.",
        epilog=f"commands:\n{commands}\n\n{PROGRAM} COMMAND --help describes a command and shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {nha_megatron.__version__}")
    return parser
