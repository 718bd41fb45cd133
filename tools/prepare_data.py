#!/usr/bin/env python
"""The same as `nha-megatron prepare`: python tools/prepare_data.py --help describes it."""

import sys

from nha_megatron.cli import prepare
from nha_megatron.cli.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command(prepare, sys.argv[1:] if argv is None else argv, "prepare_data.py")


if __name__ == "__main__":
    sys.exit(main())
