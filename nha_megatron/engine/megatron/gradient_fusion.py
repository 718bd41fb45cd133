"""Whether the Megatron engine adds weight gradients inside the matrix product (config/gradient_fusion.py says what that is)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from nha_megatron.config import ConfigError
from nha_megatron.config.gradient_fusion import EXTENSION, HOW_TO_INSTALL

if TYPE_CHECKING:
    from nha_megatron.config.training import TrainingConfig


def choose_gradient_fusion(training: TrainingConfig, device: torch.device) -> tuple[bool, str]:
    """Whether to fuse, and why. Raises ConfigError when it is asked for and the extension cannot be loaded."""
    asked = training.gradient_accumulation_fusion
    if asked is False:
        return False, "training.gradient_accumulation_fusion is false"
    if device.type != "cuda":
        return False, f"{EXTENSION} runs on CUDA devices, and this run is on {device.type}"
    try:
        importlib.import_module(EXTENSION)
    except ImportError as error:  # also one that was built for another PyTorch
        if asked is True:
            raise ConfigError(f"training.gradient_accumulation_fusion is true, but not possible: {error}; {HOW_TO_INSTALL}") from None
        return False, str(error)
    return True, f"{EXTENSION} is installed"
