"""From a YAML file and `section.key=value` overrides to a validated `RunConfig`, and back."""

import difflib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from . import consistency, refusals
from .errors import ConfigError, problems_message
from .messages import models_in, validation_messages
from .renamed import last_part, notice
from .run import RunConfig
from .yaml_text import read_value, read_yaml, write_yaml


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides such as `training.steps=100` in order, and validate.

    Raises `ConfigError` with one message that lists every problem.
    """
    data = _read_mapping(Path(path))
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Validate plain data. Raises `ConfigError` with one message that lists every problem; `source` names the data in it."""
    # A section that is only a heading in YAML (`parallel:`) is null there; it means all defaults.
    data = {key: {} if value is None and key in RunConfig.model_fields else value for key, value in data.items()}
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        messages = validation_messages(error, RunConfig)
        if any(detail["loc"] for detail in error.errors()):
            # A faulty section stopped the checks across sections: run those that do not need it.
            sections = _valid_sections(data)
            messages += consistency.problems(sections) + refusals.problems(sections)
        raise ConfigError(problems_message(source, messages)) from None


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A new configuration with overrides applied, validated again."""
    data = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration, every default written out, as YAML."""
    return write_yaml(config.model_dump(mode="json"))


def save_resolved(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration; `load_config` of the file gives an equal object. The file is complete or absent."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            file.write(dump_config(config))
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_similar_file(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; give a YAML configuration") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if data is None:
        raise ConfigError(f"{path}: the file is empty; it needs the sections {', '.join(RunConfig.model_fields)}")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level is no mapping; it must hold the sections {', '.join(RunConfig.model_fields)}")
    return data


def _similar_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Set one value in place; mappings on the way are made when absent."""
    name, equals, text = override.partition("=")
    name, renamed = name.strip(), _renamed_fields()
    if name in renamed:
        notice(name, renamed[name])
        name = renamed[name]
    keys = name.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        homes = [name for name, field in RunConfig.model_fields.items() if keys[0] in getattr(field.annotation, "model_fields", {})]
        example = f"{homes[0]}.{keys[0]}={text}" if homes else "training.steps=100"
        raise ConfigError(f"override {override!r}: write section.key=value, such as {example}")
    try:
        value = read_value(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None
    target: Any = data
    for depth, key in enumerate(keys[:-1]):
        if target.get(key) is None:
            target[key] = {}
        target = target[key]
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is not a mapping; override it as a whole")
    for old, new in renamed.items():
        if new == name:
            target.pop(last_part(old), None)  # the file may give it under the old name
    target[keys[-1]] = value


def _renamed_fields() -> dict[str, str]:
    """Old and new names of all sections."""
    found: dict[str, str] = {}
    models: list[type[BaseModel]] = [RunConfig]
    for model in models:
        found |= getattr(model, "renamed", {})
        models += [section for field in model.model_fields.values() for section in models_in(field.annotation)]
    return found


def _valid_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    valid = {}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel), name
        if name in data or not field.is_required():
            try:
                valid[name] = section.model_validate(data.get(name, {}))
            except ValidationError:
                continue
    return valid
