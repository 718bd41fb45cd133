"""What a configuration changes of the run that it continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from nha_megatron.config import RunConfig


def changed_values(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """`section.key was ..., is ...` for every value that differs between two plain resolved configurations."""
    return [
        f"{section}.{key} was {before!r}, is {now!r}"
        for section in RunConfig.model_fields
        for key, before, now in _differences(in_full(section, saved.get(section, {})), in_full(section, current.get(section, {})))
    ]


def in_full(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A saved section as today's configuration writes it: renamed fields under their new names, new ones with their defaults."""
    schema: Any = RunConfig.model_fields[section].annotation
    try:
        plain: dict[str, Any] = schema.model_validate(values).model_dump(mode="json")
    except ValidationError:  # of another version of this system: compared as it is
        return values
    return plain


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*before, *now]):
        was, is_ = before.get(key), now.get(key)
        if was != is_:
            yield key, was, is_
