"""`nha-megatron generate`: text from an exported model, through transformers alone.

A run is exported first, to a temporary directory: what talks is what its users would get.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from nha_megatron.config import ConfigError
from nha_megatron.exit_status import COMPLETE

NAME = "generate"
HELP = "continue a text with an exported model, or with the newest checkpoint of a run"
EXAMPLE = """\
nha-megatron generate exported --prompt "In the beginning" --tokens 50
nha-megatron generate runs/my-run --prompt "In the beginning\""""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="what nha-megatron export wrote, with a tokenizer; or a run's folder, its checkpoints folder or one step_N, "
        "which is exported to a temporary directory (TMPDIR says where) and removed afterwards",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="new tokens at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 for greedy (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def run(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    if not (directory / "config.json").is_file() and _is_run(directory):
        with tempfile.TemporaryDirectory(prefix="nha-generate-") as folder:
            return _export_and_continue(arguments, Path(folder) / "exported")
    for name, remedy in (
        ("config.json", "give a directory made by `nha-megatron export`"),
        ("tokenizer_config.json", "export the run again with --tokenizer DIR"),
    ):
        if not (directory / name).is_file():
            raise ConfigError(f"{directory} has no {name}: {remedy}")
    return _continue(arguments, directory)


def _is_run(directory: Path) -> bool:
    """Or a part of one that export takes."""
    from nha_megatron.checkpoint.files import MANIFEST, published_steps

    return (directory / MANIFEST).is_file() or any(published_steps(root) for root in (directory, directory / "checkpoints"))


def _export_and_continue(arguments: argparse.Namespace, out: Path) -> int:
    from nha_megatron.known_warnings import silence_known_warnings

    silence_known_warnings()
    from nha_megatron.hf.export import export_to_hf

    checkpoint = export_to_hf(arguments.directory, out)
    if not (out / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"{arguments.directory} names no tokenizer (data.tokenizer): export it with `nha-megatron export {arguments.directory} OUT "
            "--tokenizer DIR`, and give OUT"
        )
    print(f"{checkpoint}:", file=sys.stderr)
    return _continue(arguments, out)


def _continue(arguments: argparse.Namespace, directory: Path) -> int:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(arguments.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    # The modelling file comes from the directory itself; give only directories that you trust.
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": 0.95} if arguments.temperature > 0 else {}
    tokens = model.generate(**prompt, max_new_tokens=arguments.tokens, **sampling)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return COMPLETE
