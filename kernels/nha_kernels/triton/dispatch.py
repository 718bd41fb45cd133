"""Which operations the kernels serve, with which tiles, and why not: for all of them, and without triton.

The tiles are those of the architecture (architectures/); nothing is tuned at run time.
"""

import dataclasses
import importlib.util
import os

import torch
from torch import Tensor

from ..decode import DecodeMemory
from ..memory import Memory
from .architectures import Architecture, architecture_of, capability_of, checked_architecture, checked_capabilities
from .architectures.tiles import Tiles
from .hopper.conditions import HEADS
from .hopper.conditions import refusal_of_tensors as refusal_of_hopper
from .libraries.choice import choose_library, library_pays, window_call

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # comes with the CUDA builds of torch
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int | None) -> str | None:
    """Why the `triton` backend does not serve attention or a continuation; None if it does."""
    return _refusal_of_full(q, v) if window is None else refusal_of_slots(q, k, v, g)


def refusal_of_decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Memory) -> str | None:
    """Why the kernels do not serve a decode step; None if they do. Any window, T from 1 to 8."""
    if not isinstance(memory, DecodeMemory):
        return "the memory is not from decode_memory, so its window is no ring"
    tensors = [getattr(memory, field.name) for field in dataclasses.fields(memory) if field.name != "window"]
    if not all(x.is_contiguous() for x in tensors):
        return "a tensor of the memory is not contiguous"
    if memory.window_keys.dtype != q.dtype or memory.window_values.dtype != q.dtype:
        return f"the memory's window is {memory.window_keys.dtype}, the new tokens are {q.dtype}"
    reason = refusal_of_slots(q, k, v, g)
    if reason is not None:
        return reason
    group = q.shape[2] // k.shape[2]
    if group > 8:
        return f"at most 8 query heads share a KV head, given {group}"
    return None


def refusal_of_summary(k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why the kernels do not serve `slot_summary`; None if they do."""
    reason = refusal_of_device(k)
    if reason is not None:
        return reason
    if k.dtype != v.dtype or k.dtype not in _DTYPES or g.dtype != torch.float32:
        return f"the kernels take bfloat16, float16 or float32 with log-gates in float32, not {k.dtype}, {v.dtype}, {g.dtype}"
    reason = _refusal_of_sizes((k.shape[3], v.shape[3]), g.shape[3])
    if reason is not None:
        return reason
    if k.shape[0] == 0 or k.shape[1] == 0:
        return "there are no tokens"
    return None


def refusal_of_slots(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why our kernels do not read and write the slots of a call; None if they do."""
    return refusal_of_device(q) or refusal_of_shape(q, k, v, g)


def refusal_of_device(x: Tensor, *, any_capability: bool = False) -> str | None:
    """Why no kernel of this package runs where `x` is; None if they do. `any_capability`: from 8.0 on, for calls without slots."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _HAS_TRITON:
        return "the package triton is not installed"
    capability = capability_of(x.device)
    if capability is None:
        return None if interpreted else f"the kernels run on CUDA devices, the tensors are on {x.device.type}"
    if checked_architecture(capability) is not None or (any_capability and capability >= (8, 0)):
        return None
    given = "{}.{}".format(*capability)
    if any_capability:
        return f"flash attention runs on compute capability 8.0 and newer, this device has {given}"
    return f"the kernels have been checked on compute capability {checked_capabilities()} only, this device has {given}"


def refusal_of_shape(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why they do not on any device."""
    if q.dtype not in _DTYPES:
        return f"the kernels take bfloat16, float16 and float32, not {q.dtype}"
    return _refusal_of_sizes((q.shape[3], v.shape[3]), g.shape[3])


def _refusal_of_sizes(dims: tuple[int, int], slots: int) -> str | None:
    """Why no kernel of this package takes these K and V or this M; None if they do."""
    if not set(dims) <= {64, 128, 256}:
        return f"K and V must be 64, 128 or 256, given {dims}"
    if slots % 16 or not 16 <= slots <= 256:
        return f"M must be a multiple of 16 from 16 to 256, given {slots}"
    return None


def _refusal_of_full(q: Tensor, v: Tensor) -> str | None:
    """Full windows without a memory run no slot kernel, so any device serves that the libraries serve."""
    reason = refusal_of_device(q, any_capability=True)
    return _refusal_of_flash(q, v) if reason is None else reason


def _refusal_of_flash(q: Tensor, v: Tensor) -> str | None:
    dims = (q.shape[3], v.shape[3])
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"full windows go through flash attention, which takes bfloat16 and float16, not {q.dtype}"
    if dims[0] != dims[1] or dims[0] % 8 or dims[0] > 256:
        return f"full windows go through flash attention, which needs K = V, a multiple of 8 up to 256, given {dims}"
    return None


def architecture_for(x: Tensor) -> Architecture:
    """Of the device where `x` is."""
    return architecture_of(capability_of(x.device))


def choose_tiles(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tiles:
    """Tiles of attention for a call that `refusal` lets pass."""
    return architecture_for(q).attention_tiles(q, k, v, g, window)


def largest_group(q: Tensor, v: Tensor) -> int:
    """Query heads of a KV head that the attention kernels take at a time. More run in parts."""
    return architecture_for(q).largest_group(q, v)


def attends_by_library(q: Tensor, v: Tensor, window: int | None) -> bool:
    """Whether a library attends to the window and our kernels to the slots alone (attention/beside_library.py), or ours to both."""
    if window is None:
        return True
    return _refusal_of_flash(q, v) is None and library_pays(window_call(q, window, one_document=False))


def explain_dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int | None,
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
) -> str:
    """What `nha_attention(q, k, v, g, window=window, cu_seqlens=..., memory=..., backend="auto")` runs, and why: one line."""
    reason = refusal(q, k, v, g, window)
    if reason is not None:
        return f"torch: {reason}"
    if window is None and memory is not None:
        reason = refusal_of_slots(q, k, v, g)
        if reason is not None:
            return f"torch: the slots of the memory are read by kernels that do not serve the call: {reason}"
    library = ""
    if attends_by_library(q, v, window):
        choice = choose_library(window_call(q, window, one_document=cu_seqlens is None and memory is None))
        library = f"window by {choice.name} ({choice.reason})"
    if window is None and memory is None:
        return f"triton: {library}; slots are never written"
    group, most = q.shape[2] // k.shape[2], largest_group(q, v)
    count = -(-group // most)
    parts = f", {count} parts of the {group} query heads to a KV head" if count > 1 else ""
    tiles = choose_tiles(q, k, v, g, 0 if window is None else window)
    if library:
        return f"triton: {library}, slots fused{parts}, {tiles}"
    hopper = ""
    if memory is None and cu_seqlens is None and group % (HEADS * count) == 0 and refusal_of_hopper(q, v, g, window) is None:
        hopper = ", forward by the Hopper kernels where all channels rotate and empty slots attend or are masked"
    return f"triton: fused{parts}{hopper}, {tiles}"


def explain_decode_dispatch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Memory) -> str:
    """What `nha_decode_step(q, k, v, g, memory, backend="auto")` runs, and why: one line."""
    reason = refusal_of_decode(q, k, v, g, memory)
    return "triton: fused decode kernels" if reason is None else f"nha_attention: {reason}"
