"""What `pip install` gives: a wheel, made without a network and used without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import nha_megatron
from nha_megatron.config import load_config
from tests.training import small_run

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "nha_megatron", "kernels", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder build/, whose old files would be in the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip would call site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def call(installed: Path, working_directory: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Python with the wheel's packages before those of the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NHA_", "SLURM_", "RANK", "WORLD_SIZE"))}
    environment = {**kept, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", **extra}
    return subprocess.run([sys.executable, *command], cwd=working_directory, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_everything_that_a_run_needs(wheel: Path) -> None:
    assert wheel.name == f"nha_megatron-{nha_megatron.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffixes in (("nha_megatron", (".py", ".sh", ".yaml", ".json", "py.typed")), ("kernels/nha_kernels", (".py", "py.typed"))):
        package = ROOT / folder
        for path in package.rglob("*"):
            if path.is_file() and path.name.endswith(suffixes):
                assert f"{package.name}/{path.relative_to(package)}" in names
    assert {"nha_megatron/configs/quickstart.yaml", "nha_megatron/configs/deepspeed/zero1.json"} <= names  # a link in the checkout
    top = {name.split("/")[0] for name in names}
    assert top == {"nha_megatron", "nha_kernels", f"nha_megatron-{nha_megatron.__version__}.dist-info"}


def test_the_installed_command_checks_its_own_example(installed: Path, tmp_path: Path) -> None:
    where = call(installed, tmp_path, "-c", "import nha_megatron, nha_kernels; print(nha_megatron.__file__, nha_kernels.__file__)")
    assert all(path.startswith(str(installed)) for path in where.stdout.split()), where
    example = call(installed, tmp_path, "-m", "nha_megatron", "example", "quickstart")
    (tmp_path / "run.yaml").write_text(example.stdout)
    checked = call(installed, tmp_path, "-m", "nha_megatron", "check", "run.yaml")
    assert (checked.returncode, checked.stderr) == (0, "")
    # What it advises can be done here: no word of a folder that a wheel does not have.
    assert "make it with `nha-megatron prepare`" in checked.stdout and not re.search(r"tools/|launch/", checked.stdout)


def test_an_installed_package_is_frozen_with_version_checksum_and_configuration(installed: Path, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run.settings(tmp_path)))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    line = ("-m", "nha_megatron", "submit", "run.yaml", "--nodes", "1", "--time", "60", "training.steps=3")
    done = call(installed, tmp_path, *line, PATH=f"{sbatch.parent}:{os.environ['PATH']}")
    assert done.returncode == 0 and "submitted: job 7" in done.stdout, done.stderr
    (snapshot,) = (tmp_path / "run" / "submissions").iterdir()
    code = snapshot / "code"
    assert re.fullmatch(rf"nha-megatron {nha_megatron.__version__}, files sha256:[0-9a-f]{{64}}\n", (code / "REVISION").read_text())
    assert load_config(snapshot / "config.yaml") == load_config(tmp_path / "run.yaml", ["training.steps=3"])
    assert (code / "kernels/nha_kernels/operator.py").read_bytes() == (ROOT / "kernels/nha_kernels/operator.py").read_bytes()

    # The frozen code is what the job runs, and says what it is a copy of.
    says = "from nha_megatron.cluster import snapshot; print(snapshot.__file__, snapshot.revision(), sep='\\n')"
    path, revision = call(code, tmp_path, "-c", says, PYTHONPATH=f"{code}:{code}/kernels").stdout.splitlines()
    assert path.startswith(str(code)) and f"{revision}\n" == (code / "REVISION").read_text()
