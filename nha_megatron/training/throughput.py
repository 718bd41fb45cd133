"""Speed of the run: tokens a second, model FLOP utilisation, time left."""

from __future__ import annotations

from collections import deque
from statistics import median

import torch

from nha_megatron.config import RunConfig
from nha_megatron.estimate.counts import flops_per_token
from nha_megatron.training.hardware import device_peak_flops


class Throughput:
    """Turns seconds of a step into rates. Evaluation and checkpoints are not part of a step's seconds.

    The time left follows the median of the last steps, so that the slow first step and a hiccup do not move it.
    """

    def __init__(self, config: RunConfig, device: torch.device, world_size: int) -> None:
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        peak = device_peak_flops(device)
        self._peak_flops = None if peak is None else peak * world_size
        self._recent: deque[float] = deque(maxlen=20)

    def measure(self, seconds: float) -> dict[str, float]:
        """`tokens_per_second` of all ranks together and, where the chip is known, `mfu` of one step that took `seconds`."""
        self._recent.append(seconds)
        rate = self.tokens_per_step / seconds
        measured = {"tokens_per_second": rate}
        if self._peak_flops is not None:
            measured["mfu"] = rate * self._flops_per_token / self._peak_flops
        return measured

    def seconds_left(self, tokens: int) -> float:
        """For that many tokens, at the present speed."""
        return tokens / self.tokens_per_step * median(self._recent)
