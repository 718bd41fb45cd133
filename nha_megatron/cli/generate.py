"""`nha-megatron generate`: text from an exported model, through transformers alone."""

import argparse
from pathlib import Path

from nha_megatron.config import ConfigError
from nha_megatron.exit_status import COMPLETE

NAME = "generate"
HELP = "continue a text with an exported model"
EXAMPLE = 'nha-megatron generate exported --prompt "In the beginning" --tokens 50'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="what nha-megatron export wrote, with a tokenizer")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="new tokens at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 for greedy (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def run(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    for name, remedy in (
        ("config.json", "give a directory made by `nha-megatron export`"),
        ("tokenizer_config.json", "export the run again with --tokenizer DIR"),
    ):
        if not (directory / name).is_file():
            raise ConfigError(f"{directory} has no {name}: {remedy}")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(arguments.seed)
    # The modelling file comes from the directory itself; give only directories that you trust.
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": 0.95} if arguments.temperature > 0 else {}
    tokens = model.generate(**prompt, max_new_tokens=arguments.tokens, **sampling)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return COMPLETE
