"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and Weights & Biases on request.

`metrics.jsonl` is the record: one JSON object a step, and the only one that other tools of this project read.

    step               updates done, from 1
    tokens             tokens consumed since the start of the run, counted or not
    loss               mean over the counted tokens of the global batch, in nats; null where it is not finite
    grad_norm          global gradient norm before clipping; null where it is not finite
    lr                 learning rate of this update
    skipped            updates that were computed and not applied so far (see training/guards.py)
    tokens_per_second  of all ranks together, without evaluation and checkpoints
    memory             most bytes that any rank has had at once (hardware.memory_high_water), as of the last logging interval
    mfu                share of the chips' dense bf16 rate; absent where the rate is not known
    validation_loss    only on steps that end with an evaluation
    slowest_rank, slowest_host, slowest_ratio   once a logging interval, with several ranks: who works longest between collectives, and how
                       many times as long as the others (slow_ranks.py)
    further names      what layer kinds measure (LayerKind.statistics): lists, one entry a layer, null where its kind measures no such
                       thing; only on steps that were asked for

Only one rank holds these objects; the others get `None` instead of a log.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol, TextIO

from nha_megatron.config import ConfigError, LoggingConfig

METRICS_FILE = "metrics.jsonl"


class MetricsSink(Protocol):
    """Takes the record of a step; `close` is called once at the end of the run, also after an error."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends to metrics.jsonl, after dropping what a previous run wrote beyond the step this run resumes from.

    A line is handed to the operating system when its step ends, so that `tail -f` follows the run; `close` makes it durable.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        path = directory / METRICS_FILE
        truncate_after(path, resumed_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in their order; a line torn by a crash, or by a job that is writing it, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def truncate_after(path: Path, step: int) -> None:
    """Keeps the records of steps 1 .. step of a metrics file, if there is one. The file is replaced in one rename."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    aside = path.with_suffix(".jsonl.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _line(record: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: readers in other languages would refuse the line."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class TensorBoard:
    """Scalars under their metric names; per-layer lists as `name/layer_007`."""

    def __init__(self, directory: Path, resumed_step: int, every: int) -> None:
        # Imported here: it takes seconds, and only the writing rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the steps that a crashed run wrote beyond its last checkpoint.
        self._writer = SummaryWriter(log_dir=str(directory / "tensorboard"), purge_step=resumed_step + 1)
        self._every = every

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if step % self._every and "validation_loss" not in record:
            return
        for name, value in flatten(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the run's folder; a resumed run continues it."""

    def __init__(self, directory: Path, configuration: dict[str, Any], every: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logging.wandb is true, but the package wandb is not installed: `pip install wandb`, or set logging.wandb=false"
            ) from error
        name = directory.resolve().name
        self._run = wandb.init(project="nha_megatron", name=name, id=name, resume="allow", dir=str(directory), config=configuration)
        self._every = every

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] % self._every == 0 or "validation_loss" in record:
            self._run.log(flatten(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def flatten(record: dict[str, Any]) -> dict[str, float]:
    """One number a name: {"mean_decay": [a, b]} becomes {"mean_decay/layer_000": a, "mean_decay/layer_001": b}. Texts are left out."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat.update({f"{name}/layer_{layer:03d}": number for layer, number in enumerate(value) if number is not None})
        elif not isinstance(value, str):
            flat[name] = value
    return flat


class MetricsLog:
    """All sinks that the configuration asks for, written together."""

    def __init__(self, logging: LoggingConfig, configuration: dict[str, Any], resumed_step: int) -> None:
        directory = Path(logging.directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._sinks: list[MetricsSink] = [JsonLines(directory, resumed_step)]
        if logging.tensorboard:
            self._sinks.append(TensorBoard(directory, resumed_step, logging.every))
        if logging.wandb:
            self._sinks.append(WeightsAndBiases(directory, configuration, logging.every))

    def write(self, record: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
