"""The DeepSpeed engine: ZeRO 1, 2 and 3. The package deepspeed is imported when an engine is made (setup.py)."""

from nha_megatron.engine.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
