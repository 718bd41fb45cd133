"""The job script: from a site, a run and a folder to text. Pure: submits nothing, writes nothing."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nha_megatron.cluster.site import SiteConfig
from nha_megatron.config import ConfigError

CONFIG, CODE, OUTCOME = "config.yaml", "code", "outcome"
BODY = "nha_megatron/cluster/scripts/job_body.sh"

_PLAIN = re.compile(r"[^\s\"'#\\]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")


@dataclass(frozen=True)
class Submission:
    """One call of the submit helper: everything it fixes is in `folder`."""

    name: str
    nodes: int
    time: str
    folder: Path
    """Absolute; holds config.yaml, code/, job.sh, outcome and the logs."""
    run_folder: Path
    working_directory: Path
    """Relative paths of the configuration start here."""
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    health: bool = True

    def log(self, job: str) -> Path:
        """Of the job with this number."""
        return self.folder / f"job-{job}.log"


def time_seconds(text: str) -> int:
    """Seconds of a SLURM time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises `ConfigError` for anything else."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ConfigError(f"--time {text!r}: write minutes, H:MM:SS or D-HH:MM:SS")
    days, first, second, third = match.groups()
    if days is not None:  # D-H[:M[:S]]
        return ((int(days) * 24 + int(first)) * 60 + int(second or 0)) * 60 + int(third or 0)
    if third is not None:  # H:M:S
        return (int(first) * 60 + int(second)) * 60 + int(third)
    return int(first) * 60 + int(second or 0)  # M[:S]


def require_time_for_warning(site: SiteConfig, time: str) -> None:
    """Raises `ConfigError` for a limit that the warning would precede by more than half of it."""
    seconds = time_seconds(time)
    if seconds < 2 * site.warning_seconds:
        raise ConfigError(
            f"--time {time} is {seconds} s, and warning_seconds of the site {site.warning_seconds}: the job would be asked to save after "
            "less than half of its time. Give more time, or a smaller warning_seconds"
        )


def directives(site: SiteConfig, job: Submission) -> list[str]:
    """Options of sbatch, as they stand in the script."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--time={job.time}",
        f"--signal=B:USR1@{site.warning_seconds}",
        "--requeue" if site.requeue else "--no-requeue",
        "--open-mode=append",
        f"--output={str(job.folder).replace('%', '%%')}/job-%j.log",
        f"--chdir={job.working_directory}",
    ]
    for key in ("partition", "account", "qos"):
        value = getattr(site, key)
        options += [f"--{key}={value}"] if value else []
    if site.gpus_per_node:
        options.append(f"--gres=gpu:{site.gpus_per_node}" if site.gpu_option == "gres" else f"--gpus-per-node={site.gpus_per_node}")
    options += [f"--cpus-per-task={site.cpus_per_node}"] if site.cpus_per_node else []
    options += ["--exclusive"] if site.exclusive else []
    return options + list(site.sbatch_options)


def render(site: SiteConfig, job: Submission) -> str:
    """The job script. Its body is scripts/job_body.sh of the frozen code, which it sources."""
    exports = {
        "NHA_CODE": str(job.folder / CODE),
        "NHA_LAUNCHER": job.launcher,
        "NHA_REQUEUE": str(int(site.requeue)),
        "NHA_HEALTH": str(int(job.health)),
        "NHA_OUTCOME": str(job.folder / OUTCOME),
        "NPROC_PER_NODE": str(site.processes),
        "PYTHON": site.python,
        **({"NETWORK_INTERFACE": site.network_interface} if site.network_interface else {}),
        **site.environment,
    }
    lines = [
        "#!/usr/bin/env bash",
        "# Written by nha-megatron submit.",
        *(f"#SBATCH {_quoted(line)}" for line in directives(site, job)),
        "",
    ]
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += site.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    lines += _container(site, job)
    body, config = job.folder / CODE / BODY, job.folder / CONFIG
    lines += ["", f". {shlex.quote(str(body))} {shlex.quote(str(config))}", ""]
    return "\n".join(lines)


def _container(site: SiteConfig, job: Submission) -> list[str]:
    container = site.container
    if container.runtime == "none":
        return []
    assert container.image is not None
    # The run's folder holds the frozen code and configuration too. Paths inside are the paths outside.
    mounts = [f"{path}:{path}" for path in dict.fromkeys((job.run_folder, job.working_directory, Path("/tmp")))] + list(container.mounts)
    if container.runtime == "pyxis":
        options = [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={job.working_directory}",
            *container.options,
        ]
        return [f"SRUN_OPTIONS=({shlex.join(options)})"]
    binds = [part for mount in mounts for part in ("--bind", mount)]
    gpus = ["--nv"] if site.gpus_per_node else []
    command = ["apptainer", "exec", *gpus, *binds, "--pwd", str(job.working_directory), *container.options, container.image]
    return [f"IN_CONTAINER=({shlex.join(command)})"]


def require_plain_paths(site: SiteConfig, job: Submission) -> None:
    """Raises `ConfigError` for a folder that SLURM, or an option of the container, would take for something else: a job without a log."""
    refused = {
        "\\": "a backslash, which ends the replacement of %j in its paths",
        '"': "a quotation mark",
        "\n": "a line break",
        "\r": "a line break",
    }
    if site.container.runtime == "pyxis":
        refused[","] = "a comma, which separates mounts"
    if site.container.runtime != "none":
        refused[":"] = "a colon, which separates the two sides of a mount"
    for path, what in ((job.run_folder, "logging.directory"), (job.working_directory, "the working directory")):
        for character, meaning in refused.items():
            if character in str(path):
                raise ConfigError(f"{what} {str(path)!r} has {meaning}: SLURM would not take it as it is. Choose another path")
    if not re.fullmatch(r"[^\s\"\\%#]+", job.name):
        raise ConfigError(f"--name {job.name!r}: leave out blanks, quotation marks, backslashes, % and #")


def _quoted(option: str) -> str:
    # sbatch ends an option at a blank and a line at #, unless they stand in quotes; a backslash takes the next character as it is.
    # Shell quoting would not be undone.
    return option if _PLAIN.fullmatch(option) else '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'
