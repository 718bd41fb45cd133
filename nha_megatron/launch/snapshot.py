"""Freezes code and configuration of a submission, so that editing the checkout does not change a job that waits or is requeued."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from nha_megatron.config import ConfigError, RunConfig, save_resolved
from nha_megatron.launch.job import CODE, CONFIG

PARTS = ("nha_megatron", "kernels/nha_kernels", "launch")


def project_root() -> Path:
    """The checkout that this package was imported from. Raises `ConfigError` when there is none."""
    root = Path(__file__).resolve().parents[2]
    if not all((root / part).is_dir() for part in PARTS):
        raise ConfigError(f"{root} is not a checkout of this project: it has no {', '.join(PARTS)}. Submit from a checkout")
    return root


def freeze(config: RunConfig, folder: Path) -> None:
    """Writes code/, code/REVISION and config.yaml into the new folder. Raises `ConfigError` when it cannot be written."""
    root = project_root()
    try:
        folder.mkdir(parents=True)
        for part in PARTS:
            shutil.copytree(root / part, folder / CODE / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        (folder / CODE / "REVISION").write_text(revision(root) + "\n")
        save_resolved(config, folder / CONFIG)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}; choose another logging.directory") from None


def revision(root: Path) -> str:
    """Commit of the checkout, with `-dirty` when it was edited since; `unknown` outside git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
