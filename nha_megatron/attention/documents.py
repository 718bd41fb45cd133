"""Document boundaries on their way to the attention layers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class Documents(PackedSeqParams):
    """Where documents begin and end in a micro batch.

    Megatron hands `packed_seq_params` to every attention layer in every schedule and under recomputation, so it carries our
    boundaries too. `qkv_format` stays "sbhd": nothing else in Megatron then treats the batch as packed. Every pipeline stage builds
    this object from its own copy of the batch.
    """

    cu_seqlens: Tensor | None = None
    """int32 [N + 1]: boundaries in the micro batch's tokens flattened row by row, first 0, last b * s."""

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)  # megatron-core 0.17 and later have one
        if parent is not None:
            parent()
        self.qkv_format = "sbhd"
