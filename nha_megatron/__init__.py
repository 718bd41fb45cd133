"""Distributed pretraining of Native Hybrid Attention language models on Megatron-core.

The names below are what a program is meant to use. They are imported when they are first asked for: `import nha_megatron` loads no torch.
"""

from typing import TYPE_CHECKING

from nha_megatron.lazy import lazy_names
from nha_megatron.version import __version__ as __version__

if TYPE_CHECKING:
    from .config import ConfigError, RunConfig, load_config, parse_config, with_overrides
    from .hf.export import export_to_hf
    from .training.guards import TrainingError
    from .training.run import pretrain

__all__ = [
    "ConfigError",
    "RunConfig",
    "TrainingError",
    "export_to_hf",
    "load_config",
    "parse_config",
    "pretrain",
    "with_overrides",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConfigError": "nha_megatron.config",
        "RunConfig": "nha_megatron.config",
        "TrainingError": "nha_megatron.training.guards",
        "export_to_hf": "nha_megatron.hf.export",
        "load_config": "nha_megatron.config",
        "parse_config": "nha_megatron.config",
        "pretrain": "nha_megatron.training.run",
        "with_overrides": "nha_megatron.config",
    },
)
