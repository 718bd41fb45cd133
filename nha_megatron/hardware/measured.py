"""Times measured at some sizes, and what lies between them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from nha_megatron.config.base import ConfigError
from nha_megatron.hardware.network import require_positive


@dataclass(frozen=True)
class MeasuredTimes:
    """Milliseconds measured at some numbers of tokens; straight lines between them, the first and the last continued beyond."""

    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or len(self.tokens) != len(self.milliseconds):
            raise ConfigError(f"{len(self.tokens)} lengths with {len(self.milliseconds)} times: give at least two, one time for each")
        if any(later <= earlier for earlier, later in zip((0, *self.tokens), self.tokens, strict=False)):
            raise ConfigError(f"lengths {list(self.tokens)} of measured times do not increase from one token on")
        for time in self.milliseconds:
            require_positive("measured time in milliseconds", time)

    def at(self, tokens: float) -> float:
        """Milliseconds for so many tokens; never below zero."""
        right = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        (x0, x1), (y0, y1) = self.tokens[right - 1 : right + 1], self.milliseconds[right - 1 : right + 1]
        return max(y0 + (y1 - y0) * (tokens - x0) / (x1 - x0), 0.0)
