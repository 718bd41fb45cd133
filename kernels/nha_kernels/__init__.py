"""Native Hybrid Attention as one operator. Knows nothing of Megatron or of process groups."""

from typing import Any

from .backends import Implementation, register_backend
from .continuation import ContinuedTokens, continue_attention
from .conventions import LOG_GATE_MIN, clamp_log_gates
from .decode import DecodeMemory, decode_memory, nha_decode_step
from .memory import Memory
from .operator import attention_statistics, hybrid_attention, nha_attention
from .options import AttentionOptions
from .slot_summary import IN_PYTORCH, SummaryFunctions, slot_summary
from .triton.dispatch import explain_decode_dispatch, explain_dispatch, refusal, refusal_of_decode, refusal_of_summary

__all__ = [
    "LOG_GATE_MIN",
    "AttentionOptions",
    "ContinuedTokens",
    "DecodeMemory",
    "Memory",
    "attention_statistics",
    "clamp_log_gates",
    "continue_attention",
    "decode_memory",
    "explain_decode_dispatch",
    "explain_dispatch",
    "hybrid_attention",
    "nha_attention",
    "nha_decode_step",
    "register_backend",
    "slot_summary",
]


def _attention() -> Implementation:
    from .triton.attention.backend import triton_attention

    return triton_attention


def _continuation() -> Any:
    from .triton.attention.behind_memory import triton_continuation

    return triton_continuation


def _decode() -> Any:
    from .triton.decode.step import decode_step

    return decode_step


def _summary() -> SummaryFunctions:
    from .triton.summary.backend import ON_GPU

    return ON_GPU


register_backend("torch", lambda: IN_PYTORCH, operation="summary")
register_backend("triton", _attention, refusal, handles_gates=True)
register_backend("triton", _continuation, refusal, operation="continuation")
register_backend("triton", _decode, refusal_of_decode, operation="decode")
register_backend("triton", _summary, refusal_of_summary, operation="summary")
