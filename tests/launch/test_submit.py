"""The submit helper without a cluster: what it refuses, what it writes, what it would hand to sbatch."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nha_megatron.cluster.job import time_seconds
from nha_megatron.cluster.site import load_site
from nha_megatron.config import ConfigError, load_config
from tests.launch.slurm_cluster import ROOT, SUBMIT, submit_environment
from tests.training import small_run

SCRIPTS = "nha_megatron/cluster/scripts"
SITES = sorted((ROOT / "nha_megatron" / "cluster" / "sites").glob("*.yaml"))
FAKE_SBATCH = """#!/usr/bin/env bash
echo "$*" >> {log}
echo $((100 + $(wc -l < {log})))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, parallel={"context": 2}, training={"device": "auto"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path


@pytest.fixture
def sbatch(tmp_path: Path) -> Path:
    """A stand-in that accepts every job; returns the file with one line a call."""
    log, program = tmp_path / "sbatch.log", tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(FAKE_SBATCH.format(log=shlex.quote(str(log))))
    program.chmod(0o755)
    return log


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = submit_environment()
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    command = [sys.executable, str(SUBMIT), "run.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def site_file(folder: Path, **values: Any) -> tuple[str, str]:
    (folder / "site.yaml").write_text(yaml.safe_dump(values))
    return "--site", "site.yaml"


def test_dry_run_prints_the_job_script_and_writes_nothing(folder: Path, sbatch: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = submit(folder, "--nodes", "2", "--time", "1-00:00:00", "--dry-run", "training.steps=9")
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=2", "--ntasks-per-node=1", "--time=1-00:00:00", "--signal=B:USR1@300", "--requeue", f"--chdir={folder}"):
        assert f"#SBATCH {line}\n" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert sorted(folder.rglob("*")) == before


def test_what_is_submitted_is_frozen(folder: Path, sbatch: Path) -> None:
    done = submit(folder, "--nodes", "2", "--time", "600", "optimizer.lr=0.02")
    assert done.returncode == 0, done.stderr
    (snapshot,) = (folder / "run" / "submissions").iterdir()
    assert load_config(snapshot / "config.yaml") == load_config(folder / "run.yaml", ["optimizer.lr=0.02"])
    for part in ("nha_megatron/__main__.py", "kernels/nha_kernels/operator.py", f"{SCRIPTS}/torchrun.sh", f"{SCRIPTS}/job_body.sh"):
        assert (snapshot / "code" / part).read_bytes() == (ROOT / part).read_bytes()
    script = (snapshot / "job.sh").read_text()
    assert f". {snapshot}/code/{SCRIPTS}/job_body.sh {snapshot}/config.yaml\n" in script
    assert sbatch.read_text() == f"--parsable {snapshot}/job.sh\n"
    assert all(word in done.stdout for word in ("job 101", "scancel --signal=TERM --batch 101", "follow:", "resume:"))


def test_a_chain_is_jobs_that_wait_for_each_other(folder: Path, sbatch: Path) -> None:
    done = submit(folder, "--nodes", "1", "--time", "60", "--chain", "3", *site_file(folder, requeue=False), "parallel.context=1")
    assert done.returncode == 0, done.stderr
    calls = [line.split(" /")[0] for line in sbatch.read_text().splitlines()]
    assert calls == ["--parsable", "--parsable --dependency=afterany:101", "--parsable --dependency=afterany:102"]
    assert (
        "chain of jobs 101 102 103" in done.stdout and "#SBATCH --no-requeue" in next(folder.glob("run/submissions/*/job.sh")).read_text()
    )


TWO = ("--nodes", "2", "--time", "60")


def test_paths_that_slurm_would_take_for_something_else_are_escaped(folder: Path, sbatch: Path) -> None:
    """tests/launch/test_slurm.py submits one to SLURM itself."""
    run = folder / "it's 100% #1"
    done = submit(folder, *TWO, f"logging.directory='{str(run).replace(chr(39), chr(39) * 2)}'", "--name", "odd")
    assert done.returncode == 0, done.stderr
    (snapshot,) = (run / "submissions").iterdir()
    script = (snapshot / "job.sh").read_text()
    assert f'#SBATCH "--output={folder}/it\'s 100%% #1/submissions/{snapshot.name}/job-%j.log"\n' in script
    assert f"tail -F {shlex.quote(str(snapshot / 'job-101.log'))};" in done.stdout


@pytest.mark.parametrize("name", ["a\\b", 'a"b', "a\nb"])
def test_paths_that_slurm_cannot_take_are_refused(folder: Path, sbatch: Path, name: str) -> None:
    text = yaml.safe_dump(str(folder / name), default_style='"', width=10**6).strip()
    done = submit(folder, *TWO, f"logging.directory={text}")
    assert done.returncode == 2 and "SLURM would not take it as it is" in done.stderr, done.stderr
    assert not sbatch.exists()


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "unknown key": ((*TWO, "model.num_slotz=4"), {}, "did you mean 'num_slots'"),
    "engine": ((*TWO, "training.engine=deepspeed", "parallel.context=1", "parallel.pipeline=2"), {}, "deepspeed"),
    "layout": (("--nodes", "3", "--time", "60"), {}, "world size 3"),
    "batch": ((*TWO, "parallel.context=1", "training.global_batch_size=3"), {}, "global_batch_size 3"),
    "no data": ((*TWO, "data.path=nowhere"), {}, "data.path 'nowhere': no file"),
    "name": ((*TWO, "--name", "a %j"), {}, "--name 'a %j': leave out blanks"),
    "colon in a mount": ((*TWO, "logging.directory=a:b"), {"container": {"runtime": "pyxis", "image": "i"}}, "a colon, which separates"),
    "no nodes": (("--nodes", "0", "--time", "60"), {}, "--nodes 0: must be at least 1"),
    "time": (("--nodes", "2", "--time", "soon"), {}, "--time 'soon': write minutes"),
    "less time than the warning": (("--nodes", "2", "--time", "5"), {}, "less than half of its time"),
    "chain where requeue works": ((*TWO, "--chain", "2"), {}, "this site requeues jobs"),
    "cpu on a GPU site": ((*TWO, "training.device=cpu"), {"gpus_per_node": 1}, "the site gives 1 GPUs a node"),
    "cuda on a CPU site": ((*TWO, "training.device=cuda"), {}, "gpus_per_node of the site is 0"),
    "site key": (TWO, {"partitoin": "gpu"}, "partitoin: unknown key; did you mean 'partition'?"),
    "site type": (TWO, {"gpus_per_node": "eight"}, "gpus_per_node: given 'eight', must be a whole number"),
    "site container": (TWO, {"container": {"runtime": "pyxis"}}, "container: runtime pyxis with image None: give both, or neither"),
    "site option": (TWO, {"sbatch_options": ["constraint=h100"]}, "options start with --"),
    "site environment": (TWO, {"environment": {"A B": "1"}}, "environment name 'A B'"),
    "site processes": (TWO, {"gpus_per_node": 2, "processes_per_node": 4}, "processes_per_node 4 is more than gpus_per_node 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written_or_submitted(folder: Path, sbatch: Path, case: str) -> None:
    arguments, site, message = REFUSED[case]
    done = submit(folder, *arguments, *(site_file(folder, **site) if site else ()))
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert not (folder / "run").exists() and not sbatch.exists()


def test_a_refusal_by_sbatch_is_passed_on(folder: Path, sbatch: Path) -> None:
    program = folder / "bin" / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gqu' >&2\nexit 1\n")
    done = submit(folder, *TWO)
    assert done.returncode == 2 and "invalid partition specified: gqu" in done.stderr and "--site" in done.stderr


def test_without_sbatch_the_script_is_named(folder: Path) -> None:
    environment = submit_environment(PATH=str(Path(sys.executable).parent))
    done = subprocess.run([sys.executable, str(SUBMIT), "run.yaml", *TWO], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    match = re.search(r"no sbatch in PATH.*The job script is ready: sbatch (\S+)", done.stderr)
    assert match and Path(match[1]).is_file()


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_example_sites(path: Path, folder: Path) -> None:
    site = load_site(path)
    chain = () if site.requeue else ("--chain", "2")
    nodes, context = "2", site.processes
    arguments = (
        "--nodes",
        nodes,
        "--time",
        "60",
        "--site",
        str(path),
        *chain,
        f"parallel.context={context}",
        "training.global_batch_size=4",
    )
    done = submit(folder, *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert f"export NPROC_PER_NODE={site.gpus_per_node}\n" in done.stdout
    expected = {
        "bare-metal": ("#SBATCH --gpus-per-node=8\n", "module load cuda/12.8\n", "export NETWORK_INTERFACE=ib0\n"),
        "enroot-pyxis": ("SRUN_OPTIONS=('--container-image=nvcr.io#", f"{folder}:{folder}", f"--container-workdir={folder}"),
        "apptainer": (
            "#SBATCH --gres=gpu:4\n",
            "IN_CONTAINER=(apptainer exec --nv",
            f"--bind {folder}/run:{folder}/run",
            "#SBATCH --no-requeue\n",
        ),
    }[path.stem]
    assert all(text in done.stdout for text in expected), done.stdout


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("5:30", 330), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("2-00:00:01", 172801)]
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2", "-5", "1:00:00:00", "infinite"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write minutes"):
        time_seconds(text)


@pytest.mark.parametrize(("text", "message"), [("- a", "no mapping"), ("a: [", "not valid YAML"), ("\xff", "cannot be read")])
def test_a_file_that_is_no_site_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        load_site(path)
