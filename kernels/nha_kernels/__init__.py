"""Native Hybrid Attention as one operator. Knows nothing of Megatron or of process groups."""

from .conventions import LOG_GATE_MIN, clamp_log_gates
from .memory import Memory
from .operator import attention_statistics, nha_attention
from .slot_summary import slot_summary

__all__ = ["LOG_GATE_MIN", "Memory", "attention_statistics", "clamp_log_gates", "nha_attention", "slot_summary"]
