"""SIGTERM, SIGINT and SIGUSR1 as a request: finish the step, save, leave."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from nha_megatron.exit_status import announce_training


class StopRequest:
    """Remembers that a signal arrived, and lets all ranks agree on the step to stop at.

    A launcher signals its processes one after the other, so ranks hear of it in different steps; a rank that left alone
    would leave the others in a collective for ever. A second SIGTERM or SIGINT acts as it always does. SIGUSR1, a scheduler's
    warning, stays a request however often it comes: the launch scripts repeat it, because a process that is still starting misses it.

        with StopRequest() as stop:
            while ...:
                if stop.agreed(device, group): break
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._remember)
        announce_training()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number != signal.SIGUSR1:
            signal.signal(number, self._previous[number])  # type: ignore[arg-type]

    def agreed(self, device: torch.device, group: dist.ProcessGroup) -> signal.Signals | None:
        """The signal that any rank of `group` has received, the same answer on all. Collective over it: call it once a step everywhere."""
        received = torch.tensor([self._received], dtype=torch.int32, device=device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX, group=group)
        number = int(received.item())
        return signal.Signals(number) if number else None
