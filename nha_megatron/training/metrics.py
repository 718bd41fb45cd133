"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and Weights & Biases on request.

`metrics.jsonl` is the record: one JSON object a step, and the only one that other tools of this project read.

    step               updates done, from 1
    time               when the step ended, seconds since 1970 (UTC)
    step_seconds       how long it took, without evaluation and checkpoints
    epoch              how often the corpus that is used up fastest has been read since the stage began
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nha_megatron.config import ConfigError, LoggingConfig

METRICS_FILE = "metrics.jsonl"


class MetricsSink(Protocol):
    """Takes the record of a step; `close` is called once at the end of the run, also after an error.

    `write` may raise: it is called again with the next record, and then takes what it could not take before.
    """

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends to metrics.jsonl, after dropping what a previous run wrote beyond the step this run resumes from.

    A line is handed to the operating system when its step ends, so that `tail -f` follows the run; `close` makes it durable.
    What a full disk does not take is kept, and written before the next line.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        path = directory / METRICS_FILE
        truncate_after(path, resumed_step)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        self._unwritten += _line(record).encode()
        self._catch_up()

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._catch_up()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _catch_up(self) -> None:
        while self._unwritten:  # a full disk takes a part of a line
            written = self._file.write(self._unwritten) or 0
            self._unwritten = self._unwritten[written:]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in their order; what is none is left out: a line torn by a crash, or by a job that is writing it."""
    records = (_record(line) for line in path.read_bytes().split(b"\n"))
    return [record for record in records if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line, or None: a damaged disk and a careless editor leave anything."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def truncate_after(path: Path, step: int) -> None:
    """Keeps the records of steps 1 .. step of a metrics file, if there is one. The file is replaced in one rename."""
    if not path.exists():
        return
    whole = path.read_bytes()
    kept = "".join(_line(record) for record in read_metrics(path) if record["step"] <= step).encode()
    if kept == whole:  # the usual case between the phases of a run: nothing to write, so nothing that can fail
        return
    aside = path.with_suffix(".jsonl.partial")
    with aside.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _line(record: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: readers in other languages would refuse the line."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class TensorBoard:
    """Scalars under their metric names; per-layer lists as `name/layer_007`.

    Its writer works in a thread, and is dead once a write has failed: a new one then gets what was not known to be on disk.
    """

    FLUSH_S = 30.0

    def __init__(self, directory: Path, resumed_step: int, every: int) -> None:
        self._directory, self._every = str(directory / "tensorboard"), every
        self._unflushed: list[tuple[float, dict[str, Any]]] = []
        # purge_step hides the steps that a crashed run wrote beyond its last checkpoint.
        self._writer: Any = self._open(purge_step=resumed_step + 1)
        self._sent = 0
        self._flushed = time.monotonic()

    def _open(self, **options: Any) -> Any:
        # Imported here: it takes seconds, and only the writing rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=self._directory, **options)

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] % self._every and "validation_loss" not in record:
            return
        self._unflushed.append((time.time(), record))
        self._send(flush=time.monotonic() - self._flushed >= self.FLUSH_S)

    def _send(self, flush: bool) -> None:
        try:
            if self._writer is None:
                self._writer, self._sent, flush = self._open(), 0, True
            for now, record in self._unflushed[self._sent :]:
                for name, value in flatten(record).items():
                    if name != "step":
                        self._writer.add_scalar(name, value, record["step"], walltime=now)
            self._sent = len(self._unflushed)
            if flush:
                self._writer.flush()
                self._unflushed, self._sent, self._flushed = [], 0, time.monotonic()
        except Exception:
            self._writer = None
            raise

    def close(self) -> None:
        self._send(flush=True)
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the run's folder; a resumed run continues it."""

    def __init__(self, directory: Path, configuration: dict[str, Any], every: int, offline: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logging.wandb is true, but the package wandb is not installed: `pip install wandb`, or set logging.wandb=false"
            ) from error
        name = directory.resolve().name
        try:
            self._run = wandb.init(
                project="nha_megatron",
                name=name,
                id=name,
                resume="allow",
                dir=str(directory),
                config=configuration,
                mode="offline" if offline else None,
            )
        except wandb.errors.Error as error:  # no key, no network
            raise ConfigError(f"logging.wandb: {error}; set logging.wandb=offline to report later, or logging.wandb=false") from error
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
    """All sinks that the configuration asks for, written together.

    What cannot be written never ends a run: it is said once, kept where it can be, and written when it can be.

    Args:
        say: takes a line for the user.
    """

    def __init__(
        self, logging: LoggingConfig, configuration: dict[str, Any], resumed_step: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        directory = Path(logging.directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._say = say
        self._failing: set[str] = set()
        self._sinks: dict[str, MetricsSink] = {METRICS_FILE: JsonLines(directory, resumed_step)}
        if logging.tensorboard:
            self._sinks["TensorBoard"] = TensorBoard(directory, resumed_step, logging.every)
        if logging.wandb:
            self._sinks["Weights & Biases"] = WeightsAndBiases(directory, configuration, logging.every, logging.wandb == "offline")

    def write(self, record: dict[str, Any]) -> None:
        for name, sink in self._sinks.items():
            try:
                sink.write(record)
            except Exception as error:  # libraries raise anything
                if name not in self._failing:
                    self._failing.add(name)
                    self._say(f"warning: step {record['step']}: {name} cannot be written ({error}); training goes on, and tries again")
            else:
                if name in self._failing:
                    self._failing.discard(name)
                    self._say(f"step {record['step']}: {name} is written again")

    def close(self) -> None:
        for name, sink in self._sinks.items():
            try:
                sink.close()
            except Exception as error:
                self._say(f"warning: the end of {name} could not be written ({error})")
