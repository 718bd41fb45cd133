"""Compute capability 9.0 (Hopper): H100, H200, GH200.

Every choice of tiles was compared with float64 on an H100 or H200 by `kernels/benchmarks/check.py`, at a sample of head sizes, groups,
slots and conventions; why they are as they are stands in `kernels/benchmarks/README.md`.
"""

import torch
from torch import Tensor

from .tiles import DecodeTiles, SummaryTiles, Tiles

CAPABILITIES: tuple[tuple[int, int], ...] = ((9, 0),)

# Libraries by measured time (bench_wide.py): for full windows with one document in each row, and for everything else.
FULL_WINDOW_LIBRARIES: tuple[str, ...] = ("flash-attn-4", "cudnn", "flash-attn", "torch-flash")
OTHER_WINDOW_LIBRARIES: tuple[str, ...] = ("flash-attn-4", "flash-attn", "torch-flash")
# Windows up to these are faster in the fused kernels than by the library.
LIBRARY_PAYS_ABOVE = {"flash-attn-4": 512, "flash-attn": 1023, "torch-flash": 1023, "cudnn": 1023}

_FORWARD_SLAB, _BACKWARD_SLAB = 16384, 4096  # tokens whose slots are in device memory at the same time


def largest_group(q: Tensor, v: Tensor) -> int:
    """Query heads of a KV head that the kernels take at a time; tiles of more exceed shared memory, or with 256 channels in float32 compile
    for minutes. More run in parts."""
    wide = max(q.shape[3], v.shape[3]) > 128
    if q.dtype == torch.float32:
        return 1 if wide else 4
    return 4 if wide else 8


def attention_tiles(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tiles:
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
        forward_slab=_FORWARD_SLAB // chunk,
        # Half of a short sequence: its states then take less memory than what full attention keeps (at most 4 % slower at T 8192).
        backward_slab=max(_BACKWARD_SLAB, min(_FORWARD_SLAB, q.shape[1] // 2)) // chunk,
        block=8 if exact else 16,
        scan_slots=chunk,
        scan_columns=128 if usual else 64,
        scan_warps=chunk // 16,
        slots=min(most, 1 << (g.shape[3] - 1).bit_length()),
        window_rows=min(32, most) if window > 16 or not usual else 16,
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


def decode_tiles(q: Tensor, k: Tensor, v: Tensor) -> DecodeTiles:
    exact, wide = q.dtype == torch.float32, max(q.shape[3], v.shape[3]) > 128
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    return DecodeTiles(
        slots=16,
        query_rows=16 if exact or wide else max(16, 1 << (rows - 1).bit_length()),
        window_rows=16 if exact and wide else 32,
        stages=1 if exact or wide else 2,
        # For tiles that fit: three programs share a multiprocessor instead of two.
        registers=None if exact or wide or rows > 16 else 168,
    )


def summary_tiles(k: Tensor, v: Tensor, g: Tensor) -> SummaryTiles:
    exact = k.dtype == torch.float32
    most = 64 if k.dtype == torch.bfloat16 else 16 if exact and max(k.shape[3], v.shape[3]) > 128 else 32
    # 32 columns keep products in full precision off the Hopper instruction that cannot read them transposed.
    columns = 32
    if k.dtype == torch.bfloat16:
        columns = 128 if k.shape[3] % 128 == v.shape[3] % 128 == 0 else 64
    return SummaryTiles(chunk=32, slots=min(most, 1 << (g.shape[3] - 1).bit_length()), columns=columns, gate_stages=1 if exact else 3)
