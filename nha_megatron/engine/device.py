"""The one place that chooses the device of this process and the communication backend that goes with it."""

from __future__ import annotations

from typing import Literal

import torch

from nha_megatron.config import ConfigError
from nha_megatron.engine import environment


def choose_device(requested: Literal["auto", "cpu", "cuda"], local_rank: int | None = None) -> torch.device:
    """The device of this process: `cuda:<local_rank>`, or `cpu`.

    Args:
        requested: `training.device`. `auto` takes CUDA where there is any.
        local_rank: index of this process on its host; None reads LOCAL_RANK, as torchrun sets it (0 without).

    Raises ConfigError if CUDA is asked for and this host has too few devices.
    """
    if local_rank is None:
        local_rank = environment.local_rank()
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cpu" or (requested == "auto" and available == 0):
        return torch.device("cpu")
    if local_rank >= available:
        raise ConfigError(
            f"training.device is {requested!r} and this is process {local_rank} of its host, but the host shows {available} CUDA "
            f"device(s). Start at most {available} processes per host, or set training.device=cpu."
        )
    return torch.device("cuda", local_rank)


def backend_for(device: torch.device) -> str:
    """NCCL between CUDA devices, gloo between CPUs."""
    return "nccl" if device.type == "cuda" else "gloo"
