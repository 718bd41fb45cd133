#!/usr/bin/env python
"""The same as `nha-megatron generate`: python tools/generate.py --help describes it."""

import sys

from nha_megatron.cli import generate
from nha_megatron.cli.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command(generate, sys.argv[1:] if argv is None else argv, "generate.py")


if __name__ == "__main__":
    sys.exit(main())
