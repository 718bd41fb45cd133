"""Document boundaries on their way to the attention layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    """int32 [N + 1] on the device: boundaries in the micro batch's whole rows laid end to end (b * sequence length tokens), first 0. None
    where context-parallel ranks hold shards of the rows."""
    boundaries: tuple[int, ...] | None = None
    """The same numbers on the host, where the exchange between context-parallel ranks is planned; of the whole rows there too."""

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)  # megatron-core 0.17 and later have one
        if parent is not None:
            parent()
        self.qkv_format = "sbhd"

    @classmethod
    def on(cls, device: torch.device, cu_seqlens: Tensor) -> Documents:
        """From boundaries on the host; the copy to the device does not wait."""
        assert cu_seqlens.device.type == "cpu", "reading the boundaries back from a device would make the host wait for it"
        return cls(cu_seqlens=cu_seqlens.to(device, non_blocking=True), boundaries=tuple(cu_seqlens.tolist()))
