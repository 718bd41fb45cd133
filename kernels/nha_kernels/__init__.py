"""Native Hybrid Attention as one operator. Knows nothing of Megatron or of process groups."""

import importlib.util

from .continuation import ContinuedTokens, continue_attention
from .conventions import LOG_GATE_MIN, clamp_log_gates
from .decode import DecodeMemory, decode_memory, explain_decode_dispatch, nha_decode_step
from .memory import Memory
from .operator import Implementation, attention_statistics, nha_attention, register_backend
from .slot_summary import slot_summary
from .triton.dispatch import explain_dispatch, refusal

__all__ = [
    "LOG_GATE_MIN",
    "ContinuedTokens",
    "DecodeMemory",
    "Memory",
    "attention_statistics",
    "clamp_log_gates",
    "continue_attention",
    "decode_memory",
    "explain_decode_dispatch",
    "explain_dispatch",
    "nha_attention",
    "nha_decode_step",
    "register_backend",
    "slot_summary",
]


def _load_triton() -> Implementation:
    from .triton.attention import triton_attention

    return triton_attention


if importlib.util.find_spec("triton") is not None:  # comes with the CUDA builds of torch
    register_backend("triton", _load_triton, refusal, handles_gates=True)
