"""Which rank makes the others wait.

All ranks take equally long for a step, because they meet in collectives; the slow one is the one that waits least. So what is compared
is a rank's own work between collectives: reading its batches, and the forward of modules that run no collective. On CUDA the device's
clock is read around them, which sees a slow device as well as a host that feeds it late. Under an engine whose modules gather their
weights first, only the reading of batches is measured.

One step of a logging interval is measured, with hooks that are there for that step only.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from nha_megatron.engine.base import Engine
from nha_megatron.engine.layout import Layout
from nha_megatron.training.hardware import memory_high_water

# Below this share of a step nobody waits noticeably, however large the ratio.
_NOTICEABLE = 0.1
# So much more work is named at once; less only when it is the same rank in so many measured steps running, for a step of milliseconds is
# late by a half whenever the operating system does something else.
_LONG_S = 1.0
_PERSISTENT = 3


def modules_without_collectives(engine: Engine) -> Iterator[nn.Module]:
    """The largest modules of each layer whose forward runs no collective; none where modules gather their weights."""
    if engine.modules_gather_weights:
        return
    config, rank = engine.config, engine.config.rank_shape
    for chunk in engine.model_chunks:
        for layer in chunk.modules():
            if not isinstance(layer, TransformerLayer):
                continue
            if rank.sequence_parallel:  # all matrices gather or scatter
                yield from [layer.input_layernorm, layer.pre_mlp_layernorm]
                continue
            kind = config.model.stack[layer.layer_number - 1].kind
            yield from kind.modules_without_collectives(layer.self_attention, rank)
            yield layer.mlp if rank.tensor == 1 else layer.mlp.linear_fc1


class WorkClock:
    """Measures this rank's own work during a step.

        clock.start(); batches = read(); clock.batches_are_read(); train(batches); seconds = clock.stop()

    `stop` comes after the host has waited for the device, as `Engine.train_step` does.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = list(modules)
        self._on_cuda = device.type == "cuda"
        self._handles: list[Any] = []
        self._begun: list[Any] = []
        self._pairs: list[tuple[Any, Any]] = []
        self._started = self._read = 0.0

    def start(self) -> None:
        self._begun, self._pairs = [], []
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(lambda *_: self._begun.append(self._now())))
            self._handles.append(module.register_forward_hook(lambda *_: self._pairs.append((self._begun.pop(), self._now()))))
        self._started = time.perf_counter()

    def batches_are_read(self) -> None:
        self._read = time.perf_counter() - self._started

    def stop(self) -> float:
        """Seconds of work since `start`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._on_cuda:
            return self._read + sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000
        return self._read + sum(end - begin for begin, end in self._pairs)

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slowest_rank(seconds: Sequence[float], pipeline_stages: Sequence[int]) -> tuple[int, float, float] | None:
    """(rank, ratio, excess) of the rank whose work takes longest against the median of the others on its pipeline stage, in seconds.

    Pipeline stages have different work, so ranks are compared within theirs. None when no pipeline stage has two ranks.
    """
    found = None
    for rank, own in enumerate(seconds):
        others = [value for other, value in enumerate(seconds) if other != rank and pipeline_stages[other] == pipeline_stages[rank]]
        if others:
            usual = max(median(others), 1e-9)
            if found is None or own / usual > found[1]:
                found = rank, own / usual, own - usual
    return found


class RankReports:
    """Gathers what every rank reports at a logging interval. Making one, and `gather`, are collective over all ranks."""

    def __init__(self, layout: Layout, ratio: float) -> None:
        self._layout = layout
        self._ratio = ratio
        places: list[tuple[str, int]] = [("", 0)] * layout.world_size
        dist.all_gather_object(places, (socket.gethostname(), layout.pp_rank), group=layout.world)
        self._hosts, self._pipeline_stages = zip(*places, strict=True)
        self._slow: tuple[int | None, int] = None, 0  # the rank, and for how many measured steps running
        self._named: int | None = None
        self.memory = 0
        """Bytes of the fullest rank, the most so far, as of the last `gather`."""

    def gather(self, step: int, work_seconds: float, step_seconds: float) -> tuple[dict[str, Any], str | None]:
        """Fields of the step's record, and a line for the user when a rank has become slow."""
        own = torch.tensor([work_seconds, memory_high_water(self._layout.device)], dtype=torch.float64, device=self._layout.device)
        all_ranks = own.new_empty(2 * self._layout.world_size)
        dist.all_gather_into_tensor(all_ranks, own, group=self._layout.world)
        seconds, memory = all_ranks.view(-1, 2).t().tolist()
        self.memory = int(max(memory))
        slowest = slowest_rank(seconds, self._pipeline_stages)
        if slowest is None:
            return {}, None
        rank, ratio, excess = slowest
        fields = {"slowest_rank": rank, "slowest_host": self._hosts[rank], "slowest_ratio": ratio}
        slow = ratio >= self._ratio and excess >= _NOTICEABLE * step_seconds
        if not slow:
            self._slow, self._named = (None, 0), None
            return fields, None
        self._slow = rank, (self._slow[1] if self._slow[0] == rank else 0) + 1
        if self._named == rank or (excess < _LONG_S and self._slow[1] < _PERSISTENT):
            return fields, None
        self._named = rank
        return fields, (
            f"step {step}: slow rank {rank} on host {self._hosts[rank]}: its own work takes {ratio:.1f} times as long as that of the other "
            f"ranks of its pipeline stage, {excess:.2g} s more of a step of {step_seconds:.2g} s"
        )
