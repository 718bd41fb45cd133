"""Where a run's numbers go on the rank that writes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nha_megatron.training.console import Console
from nha_megatron.training.exports import BackgroundExport
from nha_megatron.training.metrics import MetricsLog


@dataclass
class Reporter:
    """Log, console and exports of the writing rank. The other ranks have none."""

    log: MetricsLog
    console: Console
    exports: BackgroundExport

    def step(self, record: dict[str, Any], seconds_left: float, warnings: Iterable[str | None]) -> None:
        self.exports.poll()
        self.log.write(record)
        self.console.step(record, seconds_left)
        for warning in warnings:
            if warning is not None:
                self.console.event(f"warning: {warning}")
        if "validation_loss" in record:
            self.console.event(f"step {record['step']}: validation loss {record['validation_loss']:.4f}")

    def close(self) -> None:
        self.exports.close()
        self.log.close()
        self.console.close()
