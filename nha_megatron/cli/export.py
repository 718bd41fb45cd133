"""`nha-megatron export`: a training checkpoint in Hugging Face format.

The result loads with plain transformers: AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True).
"""

import argparse
import sys

from nha_megatron.exit_status import COMPLETE

NAME = "export"
HELP = "write a checkpoint as a Hugging Face model directory, which plain transformers loads"
EXAMPLE = "nha-megatron export runs/my-run exported --dtype bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN", help="a run's folder, its checkpoints folder, or one step_N of it")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="DIR", help="tokenizer to include (default: the one that the run names)")
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="include no tokenizer")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="token that ends documents, where neither checkpoint nor tokenizer says")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the written weights (default: the run's precision)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a model directory")


def run(arguments: argparse.Namespace) -> int:
    from nha_megatron.known_warnings import silence_known_warnings

    silence_known_warnings()
    from nha_megatron.hf.export import export_to_hf

    checkpoint = export_to_hf(
        arguments.checkpoint,
        arguments.out,
        tokenizer=arguments.tokenizer,
        with_tokenizer=not arguments.no_tokenizer,
        end_of_text=arguments.end_of_text,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        say=lambda text: print(f"note: {text}", file=sys.stderr),
    )
    print(f"{checkpoint} -> {arguments.out}")
    return COMPLETE
