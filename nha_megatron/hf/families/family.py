"""What is asked of a family of Hugging Face models: how its configuration is read, and its table of weights.

A family is a file or a folder here, and a line in `families/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nha_megatron.config import ModelConfig
from nha_megatron.layers.hugging_face import Entry


class Family(ABC):
    """One `model_type` of Hugging Face configurations."""

    model_type: ClassVar[str]

    @abstractmethod
    def read_config(self, content: Mapping[str, Any], path: Path) -> Any:
        """The configuration in config.json. Raises `ConfigError` naming `path` where it cannot be used."""

    @abstractmethod
    def differences(self, theirs: Any, ours: ModelConfig) -> list[str]:
        """In what a configuration that `read_config` gave describes another architecture than ours."""

    @abstractmethod
    def entries(self, model: ModelConfig) -> list[Entry]:
        """The table of one model: every weight that it has, on both sides, and nothing else."""
