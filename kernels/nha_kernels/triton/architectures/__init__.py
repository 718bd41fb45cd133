"""What the kernels want to know of a GPU: one file for each compute capability that was checked, `sm90.py` the first.

README.md beside this file says how to add one. Needs no triton and no GPU to be imported.
"""

from typing import Protocol

import torch
from torch import Tensor

from . import sm90
from .tiles import DecodeTiles, SummaryTiles, Tiles

Capability = tuple[int, int]


class Architecture(Protocol):
    """What such a file defines: a static table. Tuning at run time picks different kernels on different ranks and after a restart.

    Attributes:
        CAPABILITIES: the compute capabilities on which every choice below was checked.
        FULL_WINDOW_LIBRARIES, OTHER_WINDOW_LIBRARIES: names of libraries/choice.py that were measured, the fastest first: for full windows
            with one document in each row, and for all others.
        LIBRARY_PAYS_ABOVE: by library, the widest window that the fused kernels attend to faster.
    """

    CAPABILITIES: tuple[Capability, ...]
    FULL_WINDOW_LIBRARIES: tuple[str, ...]
    OTHER_WINDOW_LIBRARIES: tuple[str, ...]
    LIBRARY_PAYS_ABOVE: dict[str, int]

    def largest_group(self, q: Tensor, v: Tensor) -> int:
        """Query heads of a KV head that the attention kernels take at a time; more run in parts."""

    def attention_tiles(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tiles: ...

    def decode_tiles(self, q: Tensor, k: Tensor, v: Tensor) -> DecodeTiles: ...

    def summary_tiles(self, k: Tensor, v: Tensor, g: Tensor) -> SummaryTiles: ...


ARCHITECTURES: tuple[Architecture, ...] = (sm90,)


def capability_of(device: torch.device) -> Capability | None:
    """None: no CUDA device (the interpreter of triton, kernels that are compiled without a GPU)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def checked_architecture(capability: Capability | None) -> Architecture | None:
    return next((architecture for architecture in ARCHITECTURES if capability in architecture.CAPABILITIES), None)


def architecture_of(capability: Capability | None) -> Architecture:
    """Where none was checked the first of the list."""
    return checked_architecture(capability) or ARCHITECTURES[0]


def checked_capabilities() -> str:
    return ", ".join(f"{major}.{minor}" for architecture in ARCHITECTURES for major, minor in architecture.CAPABILITIES)
