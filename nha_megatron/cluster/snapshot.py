"""Freezes code and configuration of a submission, so that neither an edit nor an upgrade changes a job that waits or is requeued.

A checkout and an installed package freeze to the same folder, which has the form of a checkout: code/nha_megatron,
code/kernels/nha_kernels. code/REVISION says what it is a copy of: a commit, or a version and the checksum of a wheel.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from nha_megatron.cluster.job import CODE, CONFIG
from nha_megatron.config import ConfigError, RunConfig, save_resolved

DISTRIBUTION = "nha-megatron"
REVISION = "REVISION"
PACKAGES = {"nha_megatron": "nha_megatron", "nha_kernels": "kernels/nha_kernels"}
"""Package -> its folder in a checkout."""


def freeze(config: RunConfig, folder: Path) -> None:
    """Writes code/, code/REVISION and config.yaml into the new folder. Raises `ConfigError` when it cannot be written."""
    code = folder / CODE
    try:
        folder.mkdir(parents=True)
        for package, place in PACKAGES.items():
            shutil.copytree(
                package_folder(package),
                code / place,
                ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
                ignore_dangling_symlinks=True,  # configs, where a package was copied without its checkout
            )
        (code / REVISION).write_text(revision() + "\n")
        save_resolved(config, folder / CONFIG)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}; choose another logging.directory") from None


def package_folder(package: str) -> Path:
    """Where Python found the package."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is part of this project"
    return Path(spec.origin).resolve().parent


def revision() -> str:
    """What runs: the commit of a checkout (`-dirty` when it was edited since), what a frozen copy of one says, or version and
    checksum of the installed wheel; `unknown` where none of these can be found out."""
    root = package_folder("nha_megatron").parent
    if not (root / PACKAGES["nha_kernels"]).is_dir():
        return installed_revision()
    frozen = root / REVISION
    return frozen.read_text().strip() if frozen.is_file() else _commit(root)


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed_revision() -> str:
    """`nha-megatron 0.2.0, files sha256:...`: the checksum is of the wheel's list of its files and their checksums (RECORD), without
    what an installation adds to it, so that one wheel says the same on every machine."""
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
    record = installed.read_text("RECORD") or ""
    files = sorted(line for line in record.splitlines() if line.split("/")[0] in PACKAGES and "__pycache__" not in line)
    return f"{DISTRIBUTION} {installed.version}, files sha256:{hashlib.sha256(chr(10).join(files).encode()).hexdigest()}"
