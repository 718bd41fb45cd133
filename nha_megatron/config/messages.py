"""Validation errors as sentences: what was given, what is allowed, what to change."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

_TYPE_NAMES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def validation_messages(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line for each problem, `section.key: ...`; the alternatives of a union are joined into one."""
    grouped: dict[str, list[Any]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_name(detail["loc"]), []).append(detail)
    lines: list[str] = []
    for name, details in grouped.items():
        prefix = f"{name}: " if name else ""
        types = [detail for detail in details if detail["type"] in _TYPE_NAMES]
        if len(types) > 1:
            expected = " or ".join(dict.fromkeys(_TYPE_NAMES[detail["type"]] for detail in types))
            lines.append(f"{prefix}given {_given(types[0]['input'])}, must be {expected}")
            details = [detail for detail in details if detail not in types]
        for detail in details:
            lines += [prefix + line for line in _sentences(detail, schema)]
    return lines


def _name(location: Iterable[int | str]) -> str:
    """Dotted name; the names of union alternatives that pydantic inserts are no keys of ours."""
    parts = [str(part) for part in location if not (isinstance(part, str) and (part in ("int", "str") or "[" in part))]
    return ".".join(parts)


def _sentences(detail: Any, schema: type[BaseModel]) -> list[str]:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return [_unknown_key(detail["loc"], schema)]
    if kind == "missing":
        return ["missing, and it has no default; add it"]
    if kind == "value_error":
        return str(context["error"]).splitlines()
    if kind == "literal_error":
        close = difflib.get_close_matches(str(given), context["expected"].replace("'", "").replace(" or ", ", ").split(", "), n=1)
        return [f"given {_given(given)}, allowed: {context['expected']}" + (f"; did you mean {close[0]!r}?" if close else "")]
    if kind in _TYPE_NAMES:
        return [f"given {_given(given)}, must be {_TYPE_NAMES[kind]}"]
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = kind.replace("_equal", " or equal to").replace("_than or", " than or").replace("_than", " than").replace("_", " ")
        if not words.endswith(("than", "to")):
            words += " than"
        return [f"given {_given(given)}, must be {words} {context[bounds[kind]]}"]
    if kind == "finite_number":
        return [f"given {_given(given)}, must be a finite number"]
    return [f"given {_given(given)}: {detail['msg']}"]


def _unknown_key(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """Unknown key: the nearest known one, or the section the key belongs to, or all keys that are allowed."""
    key = str(location[-1])
    section = _section_at(location[:-1], schema)
    known = list(section) if section is not None else []
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    homes = [name for name, field in schema.model_fields.items() if key in getattr(field.annotation, "model_fields", {})]
    if homes:
        return f"unknown key; it belongs to section {homes[0]!r}: {homes[0]}.{key}"
    return f"unknown key; allowed: {', '.join(known)}"


def _section_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> Mapping[str, Any] | None:
    if not location:
        return schema.model_fields
    field = schema.model_fields.get(str(location[0]))
    fields = getattr(field.annotation, "model_fields", None) if field else None
    if len(location) == 1 or fields is None:
        return fields
    return {"path": None, "weight": None}  # the only nested objects are the entries of a blend


def _given(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
