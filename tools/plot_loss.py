#!/usr/bin/env python3
"""Draws the loss curve of a run: `python tools/plot_loss.py RUN [--baseline NATS] [--output PICTURE.png]`.

RUN is a run's folder or its metrics.jsonl. The picture shows the training loss, the validation loss where there is one,
and, when given, the loss of a unigram model of the corpus as a line to fall below.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from nha_megatron.config import ConfigError
from nha_megatron.training.metrics import read_metrics

# Okabe-Ito colours: told apart without red-green vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument(
        "--baseline", type=float, metavar="NATS", help="loss of a unigram model of the corpus, drawn as a line to fall below"
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="picture to write (default: loss.png beside metrics.jsonl)")
    parser.add_argument("--title", help="title of the picture")
    arguments = parser.parse_args(argv)
    try:
        picture = plot_loss(arguments.run, arguments.output, arguments.baseline, arguments.title)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(picture)
    return 0


def plot_loss(run: Path, output: Path | None = None, unigram: float | None = None, title: str | None = None) -> Path:
    """Writes the picture and returns its path. Raises `ConfigError` when there are no metrics to draw."""
    metrics = run / "metrics.jsonl" if run.is_dir() else run
    steps, losses, validation_steps, validation_losses = read_losses(metrics)
    output = output or metrics.with_name("loss.png")

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color=BLUE, linewidth=1.2, label="training")
    if validation_steps:
        axes.plot(validation_steps, validation_losses, color=ORANGE, marker="o", markersize=4, linewidth=1.2, label="validation")
    if unigram is not None:
        axes.axhline(unigram, color=GREEN, linestyle="--", linewidth=1.0, label=f"unigram model ({unigram:.2f})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return output


def read_losses(metrics: Path) -> tuple[list[int], list[float], list[int], list[float]]:
    """(steps, losses, steps of evaluations, validation losses) of a metrics.jsonl."""
    if not metrics.is_file():
        raise ConfigError(f"{metrics} does not exist. Give the folder of a run that has started, or its metrics.jsonl")
    records = read_metrics(metrics)
    if not records:
        raise ConfigError(f"{metrics} holds no step yet. Wait for the run's first step")
    evaluated = [record for record in records if "validation_loss" in record]
    return (
        [record["step"] for record in records],
        [math.nan if record["loss"] is None else record["loss"] for record in records],  # None: not finite, a gap
        [record["step"] for record in evaluated],
        [record["validation_loss"] for record in evaluated],
    )


if __name__ == "__main__":
    sys.exit(main())
