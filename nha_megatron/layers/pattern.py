"""`model.layers`: which kind every layer is, as a short string.

    items     NAME, NAME:ARGUMENT or ARGUMENT, each with *COUNT where it repeats
    nha:64*7,full        seven layers of kind nha with window 64, one with window full: an item without a name has the name before it
    nha                  every layer; what an item leaves open, the kind takes from its own fields (for nha: model.window)

The pattern is repeated to the depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from nha_megatron.config.base import ConfigError
from nha_megatron.layers.kind import LayerKind

DEFAULT_KIND = "nha"
_ITEM = re.compile(r"(?:(?P<name>[a-z][a-z0-9_]*):)?(?P<word>[A-Za-z0-9_.=+-]+)(?:\*(?P<count>[0-9]{1,9}))?")
_GRAMMAR = (
    'a pattern is a comma-separated list of KIND, KIND:ARGUMENT or ARGUMENT, each with *COUNT where it repeats, such as "nha:64*7,full"'
)


class Layer(NamedTuple):
    """One layer of the stack: its kind, and what the kind calls its options."""

    kind: LayerKind
    options: Any

    @property
    def label(self) -> str:
        """What distinguishes it in a report."""
        return self.kind.describe(self.options)


def read_pattern(pattern: str, num_layers: int, names: Collection[str]) -> tuple[tuple[str, str | None], ...]:
    """(kind, argument) of every layer.

    Args:
        names: known kinds; a word that is none of them is an argument of the kind before it (of nha, at the beginning).

    >>> read_pattern("nha:64*3,full", 8, {"nha"})[2:5]
    (('nha', '64'), ('nha', 'full'), ('nha', '64'))
    >>> read_pattern("gdn*2,nha:full", 3, {"nha", "gdn"})
    (('gdn', None), ('gdn', None), ('nha', 'full'))

    Raises `ConfigError` for a pattern that cannot be read or does not fit the depth.
    """
    runs: list[tuple[str, str | None, int]] = []
    name = DEFAULT_KIND
    for item in pattern.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ConfigError(f"layers {pattern!r}: cannot read {item.strip()!r}; {_GRAMMAR}")
        word: str | None = match["word"]
        if match["name"] is not None:
            name = match["name"]
        elif word in names or (word != "full" and re.fullmatch("[a-z_]+[a-z0-9_]*", match["word"])):
            name, word = match["word"], None  # a kind, or meant to be one: who looks it up says which there are
        count = int(match["count"] or 1)
        if count == 0:
            raise ConfigError(f"layers {pattern!r}: {item.strip()!r} has a count of 0; leave the item out")
        runs.append((name, word, count))
    length = sum(count for *_, count in runs)
    if num_layers % length:
        raise ConfigError(
            f"layers {pattern!r} describes {length} layers, but num_layers is {num_layers}, which is not a multiple of it; change the "
            "pattern or num_layers"
        )
    return tuple((name, word) for name, word, count in runs for _ in range(count)) * (num_layers // length)


def describe_runs(labels: Iterable[str]) -> str:
    """Short text for a report, runs of equal layers joined: `7 x 64, full, 7 x 64, full`."""
    return ", ".join(label if count == 1 else f"{count} x {label}" for label, count in _runs(labels))


def _runs(labels: Iterable[str]) -> Iterator[tuple[str, int]]:
    for label, equal in groupby(labels):
        yield label, sum(1 for _ in equal)


def sum_over(layers: Iterable[Layer], number: Callable[[Layer], float]) -> Any:
    """Sum over layers, asking once for all that are equal."""
    asked: dict[Hashable, float] = {}
    total: Any = 0
    for layer in layers:
        if layer not in asked:
            asked[layer] = number(layer)
        total += asked[layer]
    return total
