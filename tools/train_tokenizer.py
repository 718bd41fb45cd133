#!/usr/bin/env python
"""The same as `nha-megatron train-tokenizer`: python tools/train_tokenizer.py --help describes it."""

import sys

from nha_megatron.cli import train_tokenizer
from nha_megatron.cli.command import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command(train_tokenizer, sys.argv[1:] if argv is None else argv, "train_tokenizer.py")


if __name__ == "__main__":
    sys.exit(main())
