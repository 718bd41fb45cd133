"""Typed run configuration: YAML and overrides in, validated immutable objects out. Imports neither torch nor Megatron.

Its names are loaded when they are used, so that `config.base` can be imported alone: the layer kinds, which the configuration asks, build
their sections on it.
"""

from typing import TYPE_CHECKING

from nha_megatron.lazy import lazy_names

if TYPE_CHECKING:
    from nha_megatron.layers.nha.windows import parse_windows

    from .checkpoint import CheckpointConfig
    from .data import BlendEntry, DataConfig
    from .errors import ConfigError, OneRankError
    from .guards import GuardsConfig
    from .load import dump_config, load_config, parse_config, save_resolved, with_overrides
    from .logging import LoggingConfig
    from .model import ModelConfig
    from .optimizer import OptimizerConfig
    from .parallel import ParallelConfig
    from .run import RunConfig
    from .training import TrainingConfig

__all__ = [
    "BlendEntry",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "GuardsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OneRankError",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_windows",
    "save_resolved",
    "with_overrides",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BlendEntry": "nha_megatron.config.data",
        "CheckpointConfig": "nha_megatron.config.checkpoint",
        "ConfigError": "nha_megatron.config.errors",
        "DataConfig": "nha_megatron.config.data",
        "GuardsConfig": "nha_megatron.config.guards",
        "LoggingConfig": "nha_megatron.config.logging",
        "ModelConfig": "nha_megatron.config.model",
        "OneRankError": "nha_megatron.config.errors",
        "OptimizerConfig": "nha_megatron.config.optimizer",
        "ParallelConfig": "nha_megatron.config.parallel",
        "RunConfig": "nha_megatron.config.run",
        "TrainingConfig": "nha_megatron.config.training",
        "dump_config": "nha_megatron.config.load",
        "load_config": "nha_megatron.config.load",
        "parse_config": "nha_megatron.config.load",
        "parse_windows": "nha_megatron.layers.nha.windows",
        "save_resolved": "nha_megatron.config.load",
        "with_overrides": "nha_megatron.config.load",
    },
)
