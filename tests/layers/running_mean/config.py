"""Section `model.running_mean`, and what one layer is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from nha_megatron.config.base import ConfigError, Positive, Section


class RunningMeanSection(Section):
    """Fields of running-mean layers."""

    width: Positive = 32
    """Channels of the mean; a layer written `running_mean:64` has its own."""
    longest: Annotated[float, Field(ge=1)] = 16.0
    """Tokens over which the slowest channel averages at the start."""


@dataclass(frozen=True)
class RunningMeanOptions:
    width: int
    longest: float


def read_options(model: Any, argument: str | None) -> RunningMeanOptions:
    """`running_mean` or `running_mean:WIDTH`."""
    section: RunningMeanSection = model.running_mean
    if argument is not None and not (argument.isdecimal() and 0 < int(argument) < 2**20):
        raise ConfigError(
            f"layers: running_mean:{argument} is not known; write running_mean, or running_mean:WIDTH with a number of channels"
        )
    return RunningMeanOptions(section.width if argument is None else int(argument), section.longest)
