"""Typed run configuration: YAML and overrides in, validated immutable objects out. Imports neither torch nor Megatron."""

from .data import BlendEntry, DataConfig
from .errors import ConfigError, OneRankError
from .guards import GuardsConfig
from .load import dump_config, load_config, parse_config, save_resolved, with_overrides
from .model import ModelConfig
from .parallel import ParallelConfig
from .run import CheckpointConfig, LoggingConfig, OptimizerConfig, RunConfig, TrainingConfig
from .windows import parse_windows

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
