"""The site file: what a cluster wants to be told, apart from the run. Examples are in sites/; `nha-megatron example` prints them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from nha_megatron.config import ConfigError
from nha_megatron.config.base import NonNegative, Positive, Section
from nha_megatron.config.errors import problems_message, raise_problems
from nha_megatron.config.messages import validation_messages
from nha_megatron.config.yaml_text import read_yaml


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class ContainerConfig(Section):
    """Where the processes run, when not on the bare node."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: enroot through SLURM's plugin; apptainer: also singularity, by its name in PATH."""
    image: str | None = None
    """pyxis: an image reference or .sqsh file; apptainer: a .sif file. Anything the runtime takes."""
    mounts: Texts = ()
    """HOST:CONTAINER folders besides the run's, the code's and the working directory."""
    options: Texts = ()
    """More options: of srun (pyxis) or of `apptainer exec`."""

    @model_validator(mode="after")
    def _consistent(self) -> ContainerConfig:
        if (self.runtime == "none") != (self.image is None):
            raise_problems([f"runtime {self.runtime} with image {self.image}: give both, or neither"])
        return self


class SiteConfig(Section):
    """One cluster, or one partition of it."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: NonNegative = 0
    """0: run on the CPUs."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How this SLURM is asked for them: --gpus-per-node=N or --gres=gpu:N."""
    cpus_per_node: Positive | None = None
    """null: what the partition gives, or all with `exclusive`."""
    exclusive: bool = True
    """Whole nodes."""
    processes_per_node: Positive | None = None
    """null: one per GPU, or one."""
    network_interface: str | None = None
    """Of the fast network, such as ib0 or hsn0; null: the libraries choose."""
    modules: Texts = ()
    """Loaded in the batch shell with `module load`."""
    setup: Texts = ()
    """Shell lines run in the batch shell before the run, such as `source /path/to/venv/bin/activate`."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Exported to all processes."""
    python: str = "python3"
    """Interpreter, as it is called on the node or in the container."""
    container: ContainerConfig = Field(default_factory=ContainerConfig)
    requeue: bool = True
    """Whether jobs may be requeued; if not, submit with --chain."""
    warning_seconds: Annotated[int, Field(ge=60, le=65535)] = 300
    """How long before the time limit SLURM warns: longer than one step and one checkpoint take."""
    sbatch_options: Texts = ()
    """More options, such as --constraint=h100 or --reservation=name."""

    @property
    def processes(self) -> int:
        """Processes per node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @model_validator(mode="after")
    def _consistent(self) -> SiteConfig:
        problems = []
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            problems.append(f"processes_per_node {self.processes} is more than gpus_per_node {self.gpus_per_node}; each needs one")
        problems += [
            f"environment name {name!r}: use letters, digits and _"
            for name in self.environment
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
        ]
        problems += [f"sbatch_options {option!r}: options start with --" for option in self.sbatch_options if not option.startswith("--")]
        if any("\n" in text for text in (*self.sbatch_options, *(value for value in (self.partition, self.account, self.qos) if value))):
            problems.append("a value for sbatch has a line break in it; remove it")
        raise_problems(problems)
        return self


def load_site(path: str | os.PathLike[str] | None) -> SiteConfig:
    """Reads a site file; None: a site that wants nothing. Raises `ConfigError` with one message that lists every problem."""
    if path is None:
        return SiteConfig()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"site file {path}: no such file; `nha-megatron example` lists site files to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"site file {path}: cannot be read: {error}") from None
    try:
        data = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"site file {path}: {error}") from None
    if not isinstance(data, dict | None):
        raise ConfigError(f"site file {path}: the top level is no mapping; see `nha-megatron example bare-metal`")
    try:
        return SiteConfig.model_validate(data or {})
    except ValidationError as error:
        raise ConfigError(problems_message(f"site file {path}", validation_messages(error, SiteConfig))) from None
