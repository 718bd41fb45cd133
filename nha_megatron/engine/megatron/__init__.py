"""The Megatron engine: its distributed optimizer and pipeline schedules. All parallelisms."""

from nha_megatron.engine.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]
