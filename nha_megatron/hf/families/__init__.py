"""Families of Hugging Face models that weights can be read from: one file or folder a family, by the `model_type` of config.json."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from nha_megatron.config import ConfigError
from nha_megatron.config.json_text import read_json
from nha_megatron.hf.families.family import Family

# model_type -> module with the object FAMILY
FAMILIES = {"nha": "nha_megatron.hf.families.nha.family"}


def family_named(model_type: str) -> Family:
    """One of FAMILIES."""
    family: Family = import_module(FAMILIES[model_type]).FAMILY
    return family


def read_directory(directory: Path) -> tuple[Family, Any]:
    """Family and configuration of a Hugging Face model directory; nothing in it is executed.

    Raises:
        ConfigError: there is no config.json, it cannot be read, or it describes a model of no family that is known.
    """
    path = directory / "config.json"
    try:
        content: dict[str, Any] = read_json(path.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except FileNotFoundError:
        raise ConfigError(f"{directory} is not a Hugging Face model directory: there is no config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{directory} holds a model of type {model_type!r}: weights are taken from type {' or '.join(map(repr, FAMILIES))} only, "
            "as `nha-megatron export` writes it"
        )
    family = family_named(str(model_type))
    return family, family.read_config(content, path)
