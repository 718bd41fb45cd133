"""Write docs/configuration.md from the fields of a run configuration: `python docs/generate_configuration.py [--check]`.

The docstring below a field (nha_megatron/config/) is its description; types, bounds and defaults are read from the field itself.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nha_megatron.config import RunConfig
from nha_megatron.config.base import MAX_SIZE, Section
from nha_megatron.layers.registry import BUILT_IN, kind_named

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """\
# Configuration reference

<!-- Written by docs/generate_configuration.py from the fields in nha_megatron/config/. Do not edit: `make docs` writes it anew. -->

One YAML file describes a run. Every value can be replaced on the command line: `section.key=value`.
`nha-megatron check CONFIG.yaml` reports every mistake in one message and starts nothing.
A field without a default must be given.

"""
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def page() -> str:
    """The whole page."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    contents = "\n".join(f"- [`{name}`](#{name}): {_summary(section)}" for name, section in sections.items())
    homes = _homes()
    return HEAD + contents + "\n" + "".join(_section(path, section, homes) for section, path in homes.items())


def _homes() -> dict[type[Section], str]:
    """Every section and where it is written, `training.stages` for example: a section that is used twice is shown once."""
    homes: dict[type[Section], str] = {}

    def visit(section: type[Section], path: str) -> None:
        if section not in homes:
            homes[section] = path
            for name, hint in _hints(section).items():
                for inner in _sections_in(hint):
                    visit(inner, f"{path}.{name}")

    for name, field in RunConfig.model_fields.items():
        visit(typing.cast(type[Section], field.annotation), name)
        for kind in BUILT_IN if name == "model" else ():
            if (section := kind_named(kind).section) is not None:
                visit(section, f"model.{kind}")
    return homes


def _section(path: str, section: type[Section], homes: Mapping[type[Section], str]) -> str:
    """Heading, description and fields of one section."""
    rows = [_row(name, section.model_fields[name], hint, homes) for name, hint in _hints(section).items()]
    heading = f"{'##' if '.' not in path else '###'} {path}"
    return "\n".join(["", heading, "", _description(section), "", "| field | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _hints(section: type[Section]) -> dict[str, Any]:
    """The types of a section's fields as they are written, bounds included."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


def _row(name: str, field: FieldInfo, hint: Any, homes: Mapping[type[Section], str]) -> str:
    cells = [f"`{name}`", describe(hint, homes), _default(field), _one_line(field.description or "as in section `optimizer`")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def describe(hint: Any, homes: Mapping[type[Section], str], limits: str = "") -> str:
    """A type in words.

    >>> from nha_megatron.config.base import Positive
    >>> describe(Positive | None, {}), describe(Literal["fp32", "bf16"], {})
    ('integer, at least 1; or null', '`fp32`, `bf16`')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(arguments[0], homes, _limits(arguments[1:]))
    if origin in (typing.Union, types.UnionType):
        return "; or ".join("null" if part is type(None) else describe(part, homes) for part in arguments)
    if origin is Literal:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in arguments)
    if origin is list:
        return f"list of {describe(arguments[0], homes)}"
    if origin is tuple:
        return f"{len(arguments)} values: {describe(arguments[0], homes)}"
    if origin is dict or hint is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, Section):
        return f"[{homes[hint]}](#{homes[hint].replace('.', '')})"
    return _NAMES[hint] + limits


def _limits(metadata: tuple[Any, ...]) -> str:
    """Bounds of a number in words; the bound that only keeps sizes in 32 bits is left out."""
    found = []
    for item in metadata:
        for constraint in getattr(item, "metadata", [item]):
            for name, word in _BOUNDS.items():
                value = getattr(constraint, name, None)
                if value is not None and value < MAX_SIZE:
                    found.append(f"{word} {value}")
    return "".join(f", {limit}" if i == 0 else f" and {limit}" for i, limit in enumerate(found))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is None else "`{}`"
    value = field.default
    if any(value < bound.ge for bound in field.metadata if hasattr(bound, "ge")):
        return "computed"  # not a value that could be given: validation replaces it
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _sections_in(hint: Any) -> Iterator[type[Section]]:
    """The sections that a field holds, by itself or in a list."""
    if isinstance(hint, type) and issubclass(hint, Section):
        yield hint
    for argument in get_args(hint):
        if isinstance(argument, type) or get_origin(argument) is not None:
            yield from _sections_in(argument)


def _description(section: Any) -> str:
    return "\n".join(line.strip() for line in (section.__doc__ or "").strip().splitlines())


def _summary(section: Any) -> str:
    return _description(section).split("\n\n")[0].replace("\n", " ")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when the page is stale")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print(f"{PAGE} is stale: run python docs/generate_configuration.py and commit the page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
