"""Submitting a run to SLURM: check everything, freeze it, write the job script, hand it over, say how to follow it."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from shlex import quote

from nha_megatron.cluster.job import Submission, render, require_plain_paths, require_time_for_warning
from nha_megatron.cluster.site import SiteConfig, load_site
from nha_megatron.cluster.snapshot import freeze
from nha_megatron.config import ConfigError, RunConfig, load_config
from nha_megatron.config.inputs import require_inputs


def submit(arguments: argparse.Namespace) -> str:
    """Submits, or with `dry_run` only checks; returns what to tell the user. Raises `ConfigError` before anything is written."""
    config = load_config(arguments.config, arguments.overrides)
    site = load_site(arguments.site)
    require_fit(config, site, arguments)
    job = plan(config, arguments)
    require_plain_paths(site, job)
    script = render(site, job)
    if arguments.dry_run:
        return f"{script}\n# dry run: nothing was written or submitted. Snapshot and job script would be in {job.folder}"
    freeze(config, job.folder)
    path = job.folder / "job.sh"
    path.write_text(script)
    return instructions(job, site, hand_over(path, arguments.chain))


def require_fit(config: RunConfig, site: SiteConfig, arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what would fail on the nodes: layout, missing files, devices, time, a chain that is none."""
    for name in ("nodes", "chain"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    config.check_world(arguments.nodes * site.processes)
    require_inputs(config)
    require_time_for_warning(site, arguments.time)
    if site.gpus_per_node and config.training.device == "cpu":
        raise ConfigError(f"training.device is cpu, but the site gives {site.gpus_per_node} GPUs a node: use another site file or device")
    if not site.gpus_per_node and config.training.device == "cuda":
        raise ConfigError("training.device is cuda, but gpus_per_node of the site is 0: give a --site file with GPUs")
    if arguments.chain > 1 and site.requeue:
        raise ConfigError(
            f"--chain {arguments.chain}: this site requeues jobs, so one job is the chain; set requeue: false in the site file"
        )


def plan(config: RunConfig, arguments: argparse.Namespace) -> Submission:
    """Names and places of a submission made now."""
    run_folder = Path(config.logging.directory).absolute()
    return Submission(
        name=arguments.name or re.sub(r"[^A-Za-z0-9_.-]", "_", run_folder.name),
        nodes=arguments.nodes,
        time=arguments.time,
        folder=run_folder / "submissions" / datetime.now().strftime("%Y%m%d-%H%M%S-%f"),
        run_folder=run_folder,
        working_directory=Path.cwd(),
        launcher=arguments.launcher,
        health=not arguments.no_health,
    )


def hand_over(script: Path, chain: int) -> list[str]:
    """Submits the script `chain` times, each job after the one before has ended; returns the job ids."""
    jobs: list[str] = []
    for _ in range(chain):
        options = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            done = subprocess.run(["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True)
        except FileNotFoundError:
            raise ConfigError(f"no sbatch in PATH: submit on a login node. The job script is ready: sbatch {quote(str(script))}") from None
        if done.returncode:
            said = " ".join(done.stderr.split())
            waiting = f" (already submitted: {' '.join(jobs)})" if jobs else ""
            raise ConfigError(
                f"sbatch refused the job{waiting}: {said}. The job script is {script}; partition, account and so on come from --site"
            )
        jobs.append(done.stdout.strip().split(";")[0])
    (script.parent / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    return jobs


def instructions(job: Submission, site: SiteConfig, jobs: Sequence[str]) -> str:
    """How to follow, stop and resume."""
    first, every = jobs[0], " ".join(jobs)
    what, then = ("job", "no requeue") if len(jobs) == 1 else ("chain of jobs", "the rest of the chain does nothing")
    lines = [
        f"submitted: {what} {every}, {job.nodes} nodes, {job.time}; snapshot in {job.folder}",
        f"follow:    squeue -j {','.join(jobs)}; tail -F {quote(str(job.log(first)))}; tail -F {quote(f'{job.run_folder}/metrics.jsonl')}",
        f"stop:      scancel --signal=TERM --batch {first}     (saves after the current step; {then})",
    ]
    if site.requeue:
        lines.append(f"pause:     scancel --signal=USR1 --batch {first}     (saves and is requeued, as at the time limit)")
    lines += [
        f"kill:      scancel {every}     (loses the steps since the last checkpoint)",
        "resume:    the same submit command again: it continues from the newest checkpoint",
    ]
    return "\n".join(lines)
