"""Which kernels serve a call, and with which tiles: one static table, no tuning at run time.

Tuning at run time picks different kernels on different ranks and after a restart. Every choice of tiles was compared with float64 on an
H100 or H200 by `kernels/benchmarks/check.py`, at a sample of head sizes, groups, slots and conventions. Needs no triton to be imported.
"""

import importlib.util
import os

import torch
from torch import Tensor

from ..memory import Memory
from .libraries import choose_library, library_pays, window_call
from .problem import Tiles

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_CHECKED_CAPABILITIES = {(9, 0)}  # the kernels compile for 8.0 (large tiles spill there) and 10.0 too, but have not run there
FORWARD_SLAB, BACKWARD_SLAB = 16384, 4096  # tokens whose slots are in device memory at the same time


def choose_tiles(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tiles:
    """Tiles for a call that `refusal` lets pass."""
    exact = q.dtype == torch.float32
    wide = max(q.shape[3], v.shape[3]) > 128
    most = 16 if exact else 32 if wide else 64
    group = min(q.shape[2] // k.shape[2], largest_group(q, v))  # larger ones run in parts
    heads = 1 << (group - 1).bit_length()
    rows = 16 * heads
    # 8 warps for no less than 128 rows: Triton 3.6 reads outside of shared memory for products [64, .] @ [., 16] by 8 warps.
    warps = 8 if rows > 64 else 4
    # The faster choice for the usual shape; the others were checked with the slower one only.
    usual = q.dtype == torch.bfloat16 and q.shape[3] == v.shape[3] == 128 and g.shape[3] in (32, 64)
    # 32 tokens of one or two query heads are at most 64 rows. Two heads with 32 slots: NaN under Triton 3.6 (check.py found it).
    chunk = 32 if usual and rows <= 32 and (heads, g.shape[3]) != (2, 32) else 16
    # The window's gradients have no state, so their tiles hold tokens as rows want it: at least 64 rows of queries, 32 beside the keys.
    return Tiles(
        chunk=chunk,
        forward_slab=FORWARD_SLAB // chunk,
        # Half of a short sequence: its states then take less memory than what full attention keeps (at most 4 % slower at T 8192).
        backward_slab=max(BACKWARD_SLAB, min(FORWARD_SLAB, q.shape[1] // 2)) // chunk,
        block=8 if exact else 16,
        scan_slots=chunk,
        scan_columns=128 if usual else 64,
        scan_warps=chunk // 16,
        slots=min(most, 1 << (g.shape[3] - 1).bit_length()),
        window=min(32, most) if window > 16 or not usual else 16,
        key_rows=min(most, 64 if window > 32 or not usual else 32 if window > 16 else 16),
        query_chunk=max(64 // heads, 16) if usual else chunk,
        key_chunk=32 // heads if usual else chunk,
        forward_registers=168 if usual else None,
        write_registers=168 if usual else None,
        forward_warps=warps,
        read_warps=warps,
        query_warps=warps,
        forward_stages=1 if usual else 2,
        query_stages=1 if usual and heads > 1 else 2,
        key_stages=3 if usual else 2,
    )


def refusal_of_device(x: Tensor, *, any_capability: bool = False) -> str | None:
    """Why no kernel of this package runs where `x` is; None if they do. `any_capability`: from 8.0 on, for calls without slots."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if x.device.type != "cuda" and not interpreted:
        return f"the kernels run on CUDA devices, the tensors are on {x.device.type}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) not in _CHECKED_CAPABILITIES:
        capability = "{}.{}".format(*torch.cuda.get_device_capability(x.device))
        if any_capability and torch.cuda.get_device_capability(x.device) >= (8, 0):
            return None
        if any_capability:
            return f"flash attention runs on compute capability 8.0 and newer, this device has {capability}"
        return f"the kernels have been checked on compute capability 9.0 only, this device has {capability}"
    return None


def attends_by_library(q: Tensor, v: Tensor, window: int | None) -> bool:
    """Whether a library attends to the window and our kernels to the slots alone (merged_attention.py); else our kernels attend to both."""
    if window is None:
        return True
    return _refusal_of_flash(q, v) is None and library_pays(window_call(q, window, one_document=False))


def refusal_of_sizes(dims: tuple[int, int], slots: int) -> str | None:
    """Why no kernel of this package takes these K and V or this M; None if they do."""
    if not set(dims) <= {64, 128, 256}:
        return f"K and V must be 64, 128 or 256, given {dims}"
    if slots % 16 or not 16 <= slots <= 256:
        return f"M must be a multiple of 16 from 16 to 256, given {slots}"
    return None


def largest_group(q: Tensor, v: Tensor) -> int:
    """Query heads of a KV head that the kernels take at a time; tiles of more exceed shared memory, or with 256 channels in float32 compile
    for minutes. More run in parts."""
    wide = max(q.shape[3], v.shape[3]) > 128
    if q.dtype == torch.float32:
        return 1 if wide else 4
    return 4 if wide else 8


def refusal(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int | None) -> str | None:
    """Why the kernels do not serve a call; None if they do."""
    return _refusal_of_full(q, v) if window is None else refusal_of_slots(q, k, v, g)


def refusal_of_slots(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why our kernels do not read and write the slots of a call; None if they do."""
    return refusal_of_device(q) or refusal_of_shape(q, k, v, g)


def refusal_of_shape(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why they do not on any device."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take bfloat16, float16 and float32, not {q.dtype}"
    return refusal_of_sizes((q.shape[3], v.shape[3]), g.shape[3])


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
    parts = f", {-(-group // most)} parts of the {group} query heads to a KV head" if group > most else ""
    tiles = choose_tiles(q, k, v, g, 0 if window is None else window)
    return f"triton: {library}, slots fused{parts}, {tiles}" if library else f"triton: fused{parts}, {tiles}"
