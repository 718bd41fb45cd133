"""The engine that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nha_megatron.engine.base import Engine
from nha_megatron.engine.layout import Layout

if TYPE_CHECKING:
    from nha_megatron.config import RunConfig


def create_engine(config: RunConfig, device: torch.device, layout: Layout) -> Engine:
    """`training.engine` on this rank, with initial weights that are the same under both. Collective over all ranks."""
    if config.training.engine == "deepspeed":
        from nha_megatron.engine.deepspeed import DeepSpeedEngine  # an optional dependency, and seconds of import

        return DeepSpeedEngine(config, device, layout)
    from nha_megatron.engine.megatron import MegatronEngine

    return MegatronEngine(config, device, layout)
