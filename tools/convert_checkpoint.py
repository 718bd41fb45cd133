#!/usr/bin/env python
"""`convert_checkpoint.py to-hf RUN OUT ...` is `nha-megatron export RUN OUT ...`: a training checkpoint in Hugging Face format."""

import argparse
import sys

from nha_megatron.cli import export
from nha_megatron.cli.command import describe, run_and_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser("to-hf", help=export.HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    describe(to_hf, export)
    return run_and_report(export.run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
