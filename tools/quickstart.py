"""The whole path on a small model: corpus, tokenizer, training with a kill and a resume, loss curve, export, generation.

    python tools/quickstart.py [CONFIG.yaml]

Every step is a command of this project that a user would run, printed before it runs. Works on CPU and on one or two GPUs;
on one GPU the two context-parallel ranks become one, since NCCL wants a GPU for each.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil

from nha_megatron.config import ConfigError, RunConfig, load_config
from nha_megatron.known_warnings import silence_known_warnings

CORPUS = Path("data/quickstart/corpus.jsonl")
NHA = ("-m", "nha_megatron")  # where it is installed, also the command `nha-megatron`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    path = parser.parse_args().config
    try:
        config = load_config(path, [])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    prepare_data(config)
    overrides = [f"parallel.context={number_of_processes()}"]
    train_with_one_interruption(path, overrides, config)
    directory = Path(config.logging.directory)
    report_losses(config, directory)
    export = directory / "huggingface"
    run(*NHA, "export", str(directory), str(export), "--overwrite")
    run(*NHA, "generate", str(export), "--prompt", "In the beginning", "--tokens", "120")
    print(f"\nquickstart finished in {(time.monotonic() - began) / 60:.1f} minutes. Run's folder: {directory}", flush=True)
    return 0


def run(*command: str) -> None:
    """Run one of the project's programs; a failure ends the quickstart with that program's own message."""
    announce(command)
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        sys.exit(status)


def announce(command: tuple[str, ...] | list[str]) -> None:
    print(f"\n$ python {shlex.join(command)}", flush=True)


def number_of_processes() -> int:
    """Two, on two GPUs or on the CPU; one on a single GPU."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


def prepare_data(config: RunConfig) -> None:
    assert isinstance(config.data.path, str) and config.data.tokenizer is not None
    run("tools/find_corpus.py", "--output", str(CORPUS))
    vocabulary = ("--vocab-size", str(config.model.vocab_size))
    run(*NHA, "train-tokenizer", "--input", str(CORPUS), *vocabulary, "--output", config.data.tokenizer)
    options = ("--tokenizer", config.data.tokenizer, "--validation-fraction", "0.05")
    run(*NHA, "prepare", "--input", str(CORPUS), *options, "--output", config.data.path)


def train_with_one_interruption(path: str, overrides: list[str], config: RunConfig) -> None:
    """Kill the run without warning once it has a checkpoint, then start the same command again: it resumes."""
    processes = number_of_processes()
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = [*launcher, *NHA, "pretrain", path, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))}
    half_way = config.training.steps // config.checkpoint.every // 2 * config.checkpoint.every
    checkpoint = config.checkpoint_directory / f"step_{half_way}"
    announce(command)
    training = psutil.Popen([sys.executable, *command], env=environment)
    try:
        while training.poll() is None and not checkpoint.exists():
            time.sleep(0.05)
    finally:
        # The launcher's ranks have sessions of their own, so each is killed by name; the launcher first, or it would report them.
        for process in [training, *training.children(recursive=True)] if training.poll() is None else []:
            process.kill()
        status = training.wait()
    if not checkpoint.exists():
        sys.exit(status)
    print(f"\nkilled after {checkpoint}; the same command again resumes from there", flush=True)
    announce(command)
    status = subprocess.run([sys.executable, *command], env=environment).returncode
    if status:
        sys.exit(status)


def report_losses(config: RunConfig, directory: Path) -> None:
    """Print the model's validation loss beside that of a unigram model of the same tokens, and draw the curve with both."""
    silence_known_warnings()
    from nha_megatron.data.token_files import TokenFile
    from nha_megatron.data.unigram import unigram_loss
    from nha_megatron.training.metrics import read_metrics

    assert isinstance(config.data.path, str) and isinstance(config.data.validation, str)
    baseline = unigram_loss(TokenFile(config.data.path), TokenFile(config.data.validation), config.model.vocab_size)
    run("tools/plot_loss.py", str(directory), "--baseline", f"{baseline:.4f}", "--output", str(directory / "loss.png"))
    losses = [record["validation_loss"] for record in read_metrics(directory / "metrics.jsonl") if "validation_loss" in record]
    print(f"\nvalidation loss {losses[-1]:.3f} nats per token; a unigram model of the corpus has {baseline:.3f}", flush=True)
    if losses[-1] > baseline - 1:
        sys.exit("error: the model did not learn: its loss should be at least 1 nat below the unigram model's")


if __name__ == "__main__":
    sys.exit(main())
