"""Layer kinds by name: those of this package, those of installed packages, and those that a program registers."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from nha_megatron.config.base import ConfigError
from nha_megatron.layers.kind import LayerKind

# Each folder's `kind.py` holds its object under the name KIND. Loaded when the name is asked for.
BUILT_IN = {"nha": "nha_megatron.layers.nha.kind"}
# An installed package offers a kind as an entry point of this group: its name, and `module:object`.
ENTRY_POINTS = "nha_megatron.layer_kinds"

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_registered: dict[str, LayerKind] = {}


def register_kind(kind: LayerKind) -> None:
    """Makes a kind known under its name in this process. Registering it again changes nothing.

    Raises `ValueError` for a name that cannot stand in a pattern, or that another kind has.
    """
    if not _NAME.fullmatch(kind.name) or kind.name == "full":
        raise ValueError(f"a layer kind cannot be named {kind.name!r}: use small letters, digits and underscores, not 'full'")
    if kind.name in BUILT_IN or _registered.setdefault(kind.name, kind) != kind:
        raise ValueError(f"a layer kind named {kind.name!r} is known already: give yours another name")


def kind_named(name: str) -> LayerKind:
    """Raises `ConfigError` with the known names when there is none of this name."""
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        kind: LayerKind = import_module(BUILT_IN[name]).KIND
        return kind
    if name in _offered():
        kind = _offered()[name].load()
        if not isinstance(kind, LayerKind) or kind.name != name:
            raise ConfigError(
                f"entry point {name!r} of {ENTRY_POINTS} is no layer kind of that name: {kind!r}; mend the package it is from"
            )
        return kind
    close = difflib.get_close_matches(name, known_kinds(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"there is no layer kind {name!r}, known are {', '.join(known_kinds())}{hint}; a kind of your own is "
        f"an entry point of {ENTRY_POINTS}, or registered before the configuration is read"
    )


def known_kinds() -> tuple[str, ...]:
    """Names that may stand in `model.layers`."""
    return tuple(sorted({*BUILT_IN, *_registered, *_offered()}))


@cache
def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
