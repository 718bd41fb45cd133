"""`nha-megatron example`: files to start from, which an installed user has no checkout to copy from."""

import argparse
import difflib
from pathlib import Path

from nha_megatron.config import ConfigError
from nha_megatron.exit_status import COMPLETE

NAME = "example"
HELP = "print a ready-made run configuration, DeepSpeed settings or a SLURM site file; without a name list them"
EXAMPLE = "nha-megatron example quickstart > run.yaml"

PACKAGE = Path(__file__).resolve().parents[1]
KINDS = {"run configurations": "configs/*.yaml", "DeepSpeed settings": "configs/deepspeed/*.json", "site files": "cluster/sites/*.yaml"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one")


def run(arguments: argparse.Namespace) -> int:
    files = {path.stem: path for pattern in KINDS.values() for path in sorted(PACKAGE.glob(pattern))}
    if arguments.name is None:
        for kind, pattern in KINDS.items():
            print(f"{kind}: {', '.join(sorted(path.stem for path in PACKAGE.glob(pattern)))}")
        return COMPLETE
    if arguments.name not in files:
        close = difflib.get_close_matches(arguments.name, files, n=1)
        raise ConfigError(
            f"no example {arguments.name!r}; " + (f"did you mean {close[0]!r}? Allowed: " if close else "allowed: ") + ", ".join(files)
        )
    print(files[arguments.name].read_text(encoding="utf-8"), end="")
    return COMPLETE
