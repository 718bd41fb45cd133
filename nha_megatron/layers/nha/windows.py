"""`model.window`: which window every layer has, as a short string."""

import re
from functools import lru_cache

from nha_megatron.config.base import ConfigError

_ITEM = re.compile(r"(?P<size>full|[0-9]+)(?:\*(?P<count>[0-9]+))?")
_GRAMMAR = 'a pattern is a comma-separated list of SIZE or SIZE*COUNT, where SIZE is a number of tokens or "full", such as "64*7,full"'
MAX_WINDOW = 2**31 - 1


@lru_cache(maxsize=64)
def parse_windows(pattern: int | str, num_layers: int) -> tuple[int | None, ...]:
    """Window of every layer in tokens, the current token included; None stands for global (`full`) attention, 0 for slots alone.

    The pattern is repeated to the depth, so the depth must be a multiple of its length.

    >>> parse_windows(64, 3)
    (64, 64, 64)
    >>> parse_windows("full", 2)
    (None, None)
    >>> parse_windows("64*3,full", 8)
    (64, 64, 64, None, 64, 64, 64, None)
    >>> parse_windows("0, 32*2, full", 4)
    (0, 32, 32, None)

    Raises `ConfigError` for a pattern that cannot be read or does not fit the depth.
    """
    items = [str(pattern)] if isinstance(pattern, int) else pattern.split(",")
    runs: list[tuple[int | None, int]] = []
    for item in items:
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ConfigError(f"window pattern {pattern!r}: cannot read {item.strip()!r}; {_GRAMMAR}")
        digits, count = match["size"], match["count"] or "1"
        # Compare lengths first: Python refuses to convert thousands of digits.
        if len(count) > 9 or (digits != "full" and (len(digits) > 10 or int(digits) > MAX_WINDOW)):
            raise ConfigError(f"window pattern {pattern!r}: {item.strip()!r} is too large; a window is at most {MAX_WINDOW} tokens")
        if int(count) == 0:
            raise ConfigError(f"window pattern {pattern!r}: {item.strip()!r} has a count of 0; leave the item out")
        runs.append((None if digits == "full" else int(digits), int(count)))

    length = sum(count for _, count in runs)
    if num_layers % length:
        raise ConfigError(
            f"window pattern {pattern!r} describes {length} layers, but num_layers is {num_layers}, which is not a multiple of it; "
            "change the pattern or num_layers"
        )
    return tuple(window for window, count in runs for _ in range(count)) * (num_layers // length)


def describe_window(window: int | None) -> str:
    """As it stands in a pattern."""
    return "full" if window is None else str(window)
