"""Validation errors as sentences: what was given, what is allowed, what to change."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

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
}
# pydantic's error type -> (words, key of the bound in the error's context)
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
Location = tuple[int | str, ...]


def validation_messages(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line for each problem, `section.key: ...`, in the order of the schema; the alternatives of a union are joined into one line."""
    grouped: dict[Location, list[Any]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_keys(detail), []).append(detail)

    lines: list[str] = []
    for keys, details in grouped.items():
        prefix = f"{'.'.join(map(str, keys))}: " if keys else ""
        wrong_types = [detail for detail in details if detail["type"] in _TYPE_NAMES]
        deeper = any(other[: len(keys)] == keys and len(other) > len(keys) for other in grouped)
        if len(wrong_types) == len(details) and not deeper:
            # Any other error means that one alternative of the union has the right type: that error says what is wrong with it.
            expected = " or ".join(dict.fromkeys(_TYPE_NAMES[detail["type"]] for detail in wrong_types))
            lines.append(f"{prefix}given {_shown(wrong_types[0]['input'])}, must be {expected}")
        for detail in details:
            if detail not in wrong_types:
                lines += [prefix + line for line in _sentences(detail, schema)]
    return lines


def _keys(detail: Any) -> Location:
    """Location in the user's terms: without the names of union alternatives that pydantic inserts."""
    *above, last = detail["loc"] or ("",)
    keys = [part for part in above if not _is_alternative(part)]
    if last != "" and (detail["type"] in _UNKNOWN_KEY or not _is_alternative(last)):
        keys.append(last)
    return tuple(keys)


def _is_alternative(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("int", "str") or "[" in part)


def _sentences(detail: Any, schema: type[BaseModel]) -> list[str]:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _UNKNOWN_KEY:
        return [_unknown_key(_keys(detail), schema)]
    if kind == "missing":
        return ["missing, and it has no default; add it"]
    if kind == "value_error":  # raised by our own validators: complete sentences, one a line
        return str(context["error"]).splitlines()
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.7)
        return [f"given {_shown(given)}, allowed: {context['expected']}" + (f"; did you mean {close[0]!r}?" if close else "")]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return [f"given {_shown(given)}, must be {words} {_number(context[bound])}"]
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        return [
            f"given {_shown(given)}, must have at {'least' if few else 'most'} {context['min_length' if few else 'max_length']} entries"
        ]
    if kind == "finite_number":
        return [f"given {_shown(given)}, must be a finite number"]
    return [f"given {_shown(given)}: {detail['msg']}"]


def _unknown_key(keys: Location, schema: type[BaseModel]) -> str:
    """The nearest known key, or the section that has this key, or all keys that are allowed."""
    key = str(keys[-1])
    known = list(_fields_at(keys[:-1], schema))
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    homes = [name for name, field in schema.model_fields.items() if key in getattr(field.annotation, "model_fields", {})]
    if homes:
        return f"unknown key; it belongs to section {homes[0]!r}: {homes[0]}.{key}"
    return f"unknown key; allowed: {', '.join(known)}"


def _fields_at(keys: Location, schema: type[BaseModel]) -> Mapping[str, Any]:
    """Fields of the objects that may stand there; the numbers among the keys are places in a list."""
    models = [schema]
    for key in keys:
        if isinstance(key, str):
            models = [found for model in models for found in _models_at(model, key)]
    return {name: field for model in models for name, field in model.model_fields.items()}


def _models_at(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    if key in model.model_fields:
        return models_in(model.model_fields[key].annotation)
    section_of_kind = getattr(model, "section_of_kind", None)  # of ModelConfig: sections that layer kinds bring
    section = None if section_of_kind is None else section_of_kind(key)
    return [] if section is None else [section]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
