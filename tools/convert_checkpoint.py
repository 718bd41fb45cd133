"""Convert a training checkpoint to Hugging Face format.

python tools/convert_checkpoint.py to-hf RUN OUT [--tokenizer DIR | --no-tokenizer] [--dtype bf16|fp32] [--overwrite]

RUN is a run's folder, its `checkpoints` folder or one step_N of it. The result loads with plain transformers:
AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nha_megatron.config import ConfigError
from nha_megatron.known_warnings import silence_known_warnings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 after one message about what is wrong with the input."""
    arguments = parse(argv)
    silence_known_warnings()
    from nha_megatron.hf.export import export_to_hf  # takes seconds: not needed to show the usage

    try:
        checkpoint = export_to_hf(
            arguments.checkpoint,
            arguments.out,
            tokenizer=arguments.tokenizer,
            with_tokenizer=not arguments.no_tokenizer,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint} -> {arguments.out}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_hf = commands.add_parser("to-hf", help="write a Hugging Face model directory")
    to_hf.add_argument("checkpoint", metavar="RUN", help="a run's folder, its checkpoints folder, or one step_N of it")
    to_hf.add_argument("out", metavar="OUT", help="directory to write")
    tokenizer = to_hf.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="tokenizer to include (default: the one that the run names)")
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="include no tokenizer")
    to_hf.add_argument("--dtype", choices=("bf16", "fp32"), help="of the written weights (default: the run's precision)")
    to_hf.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model directory")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
