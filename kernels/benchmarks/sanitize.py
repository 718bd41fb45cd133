"""Runs every kernel once for each class of launch configurations under compute-sanitizer: reads and writes outside of memory, races.

    PYTHONPATH=kernels python kernels/benchmarks/sanitize.py [--tools memcheck,racecheck] [--output results/sanitize.txt] [--only PATTERN]

compute-sanitizer comes with the CUDA toolkit. Each case is a process: first without the tool, which compiles the kernels into Triton's
cache, then under it, with an allocation of its own for each tensor, so that a neighbour in PyTorch's pool does not hide an error. Exit
status 1 when a tool finds something or a case does not finish.
"""

import argparse
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
from check import make_inputs, run
from check_cases import Case
from check_decode import DecodeCase, check_decode
from check_summary import SummaryCase, check_summary
from compare import require_cuda_device

_SECONDS = 100  # of one case under one tool

CASES: list[Case | DecodeCase | SummaryCase] = [
    Case(tokens=75, kv_heads=1),
    Case(tokens=300, kv_heads=44),  # programs of the forward for Hopper GPUs that take several chunks
    Case(tokens=75, kv_heads=1, group=1, window=20),
    Case(tokens=75, kv_heads=1, group=8, slots=128, window=0),
    Case(tokens=75, kv_heads=1, group=2, slots=48, documents=(0, 20, 20, 75), memory=(40,), empty_slots="weight"),
    Case(tokens=45, kv_heads=1, group=12, slots=32, batch=2, memory=(5, 40), window=33),
    Case(tokens=45, kv_heads=1, key_dim=256, value_dim=256, window=32),
    Case(tokens=45, kv_heads=1, group=1, key_dim=256, value_dim=256, window=32),
    Case(tokens=45, kv_heads=1, group=2, slots=32, window=32),
    Case(tokens=45, kv_heads=1, key_dim=64, value_dim=64, dtype="float16", slots=16),
    Case(tokens=45, kv_heads=1, group=2, dtype="float32", slots=32, memory=(30,), empty_slots="mask"),
    Case(tokens=45, kv_heads=1, group=1, dtype="float16", slots=16, window=5),
    Case(tokens=45, kv_heads=1, group=1, dtype="float32", key_dim=256, value_dim=256),
    Case(tokens=600, kv_heads=1, window=550, batch=2, memory=(30, 500), dtype="float32", rotary_dim=0),
    Case(tokens=1200, kv_heads=1, window=1100, batch=2, memory=(30, 500)),
    Case(tokens=70, kv_heads=1, window=None, memory=(30,), documents=(0, 30, 70)),
    Case(tokens=70, kv_heads=1, window=None, deterministic=False),
    DecodeCase(kv_heads=1, seen=(0, 90), steps=(1, 5)),
    DecodeCase(kv_heads=1, group=1, seen=(40,), steps=(2,), window=300, empty_slots="weight", dtype="float32"),
    SummaryCase(tokens=600, kv_heads=1),
    SummaryCase(tokens=75, kv_heads=1, slots=48, key_dim=64, dtype="float32"),
]


class Finding(NamedTuple):
    name: str
    tool: str
    verdict: str
    clean: bool
    seconds: float
    log: str


def run_case(case: Case | DecodeCase | SummaryCase) -> None:
    """The kernels only: check.py is who compares."""
    if isinstance(case, DecodeCase):
        check_decode(case, seed=1)
    elif isinstance(case, SummaryCase):
        check_summary(case, seed=1)
    else:
        inputs, memory, options = make_inputs(case, seed=1)
        run(inputs, memory, options, "triton", getattr(torch, case.dtype))
    torch.cuda.synchronize()


def find_tool() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), *sorted(glob.glob("/usr/local/cuda*"), reverse=True)]
    wheels = importlib.util.find_spec("nvidia")
    homes += [str(path) for root in (wheels.submodule_search_locations or [] if wheels else []) for path in pathlib.Path(root).glob("*")]
    folders = [f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_under(tool: str | None, program: str, index: int) -> Finding:
    command = [sys.executable, __file__, "--case", str(index)]
    environment = dict(os.environ)
    if tool is not None:
        command = [program, "--tool", tool, "--print-limit", "20", "--error-exitcode", "86", *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    began = time.time()
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_SECONDS, check=False
        )
        log, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        log, status = (error.stdout or b"").decode(errors="replace"), -1
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    clean = status == 0 and (tool is None or bool(summary))
    verdict = summary[-1] if summary else "finished" if status == 0 else "ran out of time" if status == -1 else f"exit status {status}"
    return Finding(CASES[index].name, tool or "no tool", verdict, clean, time.time() - began, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression that a case's name must match somewhere")
    parser.add_argument("--jobs", type=int, default=min(len(CASES), os.cpu_count() or 1))
    parser.add_argument("--output", type=pathlib.Path, help="text file: a line a case, and the whole log of what is not clean")
    parser.add_argument("--case", type=int, help="run this case in this process and nothing else")
    arguments = parser.parse_args()
    require_cuda_device()
    if arguments.case is not None:
        run_case(CASES[arguments.case])
        return
    program = find_tool()
    if program is None:
        sys.exit("compute-sanitizer was found neither on the PATH nor in CUDA_HOME: it comes with the CUDA toolkit")
    chosen = [index for index, case in enumerate(CASES) if re.search(arguments.only, case.name)]
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip().splitlines()[-1:]
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, compute-sanitizer {' '.join(version)}"
    ]
    print(lines[0], flush=True)
    clean, logs = True, []
    for tool in (None, *arguments.tools.split(",")):
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for finding in pool.map(lambda index, tool=tool: run_under(tool, program, index), chosen):
                lines.append(f"{finding.seconds:6.1f}s {finding.tool:<9} {finding.name} | {finding.verdict}")
                print(lines[-1], flush=True)
                if not finding.clean:
                    clean = False
                    logs.append(f"\n{lines[-1]}\n{finding.log[-6000:]}")
    lines.append("clean" if clean else "NOT clean")
    print(lines[-1], *logs, sep="\n")
    if arguments.output:
        arguments.output.write_text("\n".join([*lines, *logs]) + "\n")
    sys.exit(not clean)


if __name__ == "__main__":
    main()
