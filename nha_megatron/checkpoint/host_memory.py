"""Host memory for copies of the training state, kept from one checkpoint to the next.

Training stands still while the state is copied, and memory that a process has just been given is slow: the system clears it page by page
at the first write. Copying 4 GB from an H200 took 2.2 s into fresh memory and 0.23 s into memory that had been written before
(pinned: 0.07 s, and 1.8 s to pin it, for sizes rounded up to powers of two).
"""

from __future__ import annotations

import torch
from torch import Tensor

_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...]]


class HostMemory:
    """Copies tensors into host memory. `begin` gives up the copies made before it: their memory takes those that follow."""

    def __init__(self) -> None:
        self._used: list[Tensor] = []
        self._free: dict[_Kind, list[Tensor]] = {}

    def begin(self) -> None:
        self._free = {}
        for tensor in self._used:
            self._free.setdefault(_kind(tensor), []).append(tensor)
        self._used = []

    def copy(self, tensor: Tensor) -> Tensor:
        """As `tensor.to("cpu", copy=True)`: it sees what the current stream has written, and is done when it returns."""
        shape = torch.empty_like(tensor, device="meta")
        free = self._free.get(_kind(shape))
        host = free.pop() if free else torch.empty_like(shape, device="cpu")
        self._used.append(host)
        return host.copy_(tensor.detach())


def _kind(tensor: Tensor) -> _Kind:
    return tensor.dtype, tensor.shape, tensor.stride()
