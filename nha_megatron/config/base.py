"""What all sections of a run configuration share: strict, closed, immutable."""

import os
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .errors import ConfigError as ConfigError  # for layer kinds, which import nothing else of the configuration
from .renamed import with_new_names

# Sizes end up in 32-bit kernel arguments and collective counts; larger ones are a typing mistake.
MAX_SIZE = 2**31 - 1

Positive = Annotated[int, Field(ge=1, le=MAX_SIZE)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_SIZE)]
PositiveReal = Annotated[float, Field(gt=0)]
NonNegativeReal = Annotated[float, Field(ge=0)]


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def _usable_path(path: str) -> str:
    if not path.strip():
        raise ValueError("given an empty path; write a path, or null where the field is optional")
    if "\0" in path:
        raise ValueError("the path contains a NUL character, which no file system allows; remove it")
    return _expanded(path)


def _expanded(path: str) -> str:
    """`~` and `$NAME` or `${NAME}` as a shell replaces them: nobody means a folder of that name. `./~` and a `$` before no name stay."""
    absent = [name for found in _VARIABLE.finditer(path) if (name := found[1] or found[2]) not in os.environ]
    if absent:
        raise ValueError(f"given {path!r}, but the environment has no variable {absent[0]}; set it, or write the path out")
    whole = os.path.expanduser(_VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], path))
    if whole.startswith("~"):
        user = whole.split("/", 1)[0]
        raise ValueError(f"given {path!r}, but there is no user {user[1:]!r} here; write the path out (./{user} is a folder of that name)")
    return whole


PathString = Annotated[str, AfterValidator(_usable_path)]

T = TypeVar("T")


def _list_as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


# YAML has lists only; strict validation would refuse them for a tuple.
Pair = Annotated[tuple[T, T], BeforeValidator(_list_as_tuple)]


class Section(BaseModel):
    """Base of every section: unknown keys, wrong types, infinities and NaN are refused; objects are immutable.

    The docstring below a field is its documentation (meaning, units, allowed values).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of fields that are still taken, and the new ones, both from the top of the configuration: {"guards.old": "guards.new"}."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, data: Any) -> Any:
        return with_new_names(data, cls.renamed) if cls.renamed and isinstance(data, Mapping) else data

    def __eq__(self, other: object) -> bool:
        """By fields alone: what was computed from them may refer to the object itself."""
        if not isinstance(other, Section) or type(self) is not type(other):
            return NotImplemented
        return self._values() == other._values()

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields} | (self.model_extra or {})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, not validated. What was computed from the old values is left out."""
        copied = super().model_copy(update=update, deep=deep)
        for name in [name for name in copied.__dict__ if isinstance(getattr(type(self), name, None), cached_property)]:
            del copied.__dict__[name]
        return copied
