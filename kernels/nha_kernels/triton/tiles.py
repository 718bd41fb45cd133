"""Tiles of a chunk: loads, logits and pair decays, the same in forward and backward. Words: see common.py."""

import triton
import triton.language as tl

from .common import LARGEST_EXPONENT, channel_halves, decay_exponent, load_starts, reference_token, rotate, write_strength

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def load_halves(at, row, row_ok, K: tl.constexpr, HALF: tl.constexpr):
    """Rows of K channels as the two halves that rotate against each other: two tiles [rows, K / 2]."""
    first, second = channel_halves(tl.arange(0, K // 2), K, HALF)
    at_row = at + row[:, None] * K
    return (
        tl.load(at_row + first[None, :], mask=row_ok[:, None], other=0.0),
        tl.load(at_row + second[None, :], mask=row_ok[:, None], other=0.0),
    )


@triton.jit
def load_state_halves(at, row, row_ok, K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """As `load_halves`, from rows that are WIDTH apart."""
    first, second = channel_halves(tl.arange(0, K // 2), K, HALF)
    at_row = at + row[:, None] * WIDTH
    return (
        tl.load(at_row + first[None, :], mask=row_ok[:, None], other=0.0),
        tl.load(at_row + second[None, :], mask=row_ok[:, None], other=0.0),
    )


@triton.jit
def store_halves(at, row, row_ok, x1, x2, K: tl.constexpr, HALF: tl.constexpr):
    first, second = channel_halves(tl.arange(0, K // 2), K, HALF)
    at_row = at + row[:, None] * K
    tl.store(at_row + first[None, :], x1.to(at.dtype.element_ty), mask=row_ok[:, None])
    tl.store(at_row + second[None, :], x2.to(at.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def load_rows(at, row, row_ok, N: tl.constexpr):
    return tl.load(at + row[:, None] * N + tl.arange(0, N)[None, :], mask=row_ok[:, None], other=0.0)


@triton.jit
def load_angles(cos, sin, offset, K: tl.constexpr):
    at = offset[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
    return tl.load(cos + at), tl.load(sin + at)


@triton.jit
def rotated(x1, x2, cos, sin, offset, K: tl.constexpr, ROPE: tl.constexpr):
    """Halves rotated to `offset`, in the inputs' dtype."""
    if ROPE:
        c, s = load_angles(cos, sin, offset, K)
        r1, r2 = rotate(x1.to(tl.float32), x2.to(tl.float32), c, s)
        return r1.to(x1.dtype), r2.to(x1.dtype)
    return x1, x2


@triton.jit
def dot_halves(a1, a2, b1, b2):
    """a @ b^T for tiles in halves."""
    product = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    return tl.dot(a2, tl.trans(b2), product, input_precision="ieee")


@triton.jit
def decay_dtype(x):
    """A decayed operand reaches e^64, so fp16 inputs decay in bf16."""
    return tl.bfloat16 if x.dtype == tl.float16 else x.dtype


@triton.jit
def window_visible(row, query_row, first, W):
    """[queries, keys]: extended rows that a query sees in its window."""
    lag = query_row[:, None] - row[None, :]
    return (lag >= 0) & (lag < W) & (row[None, :] >= first[:, None])


@triton.jit
def visible_pairs(token, first, index, index_first, written, DOCS: tl.constexpr):
    """[rows, C]: writes of this chunk that a query reads."""
    pairs = (index[None, :] <= token[:, None]) & written[None, :]
    if DOCS == 2:
        pairs = pairs & (index_first[None, :] == first[:, None])
    return pairs


@triton.jit
def row_factor(
    token,
    first,
    start,
    b,
    t0,
    T,
    held,
    index,
    gate,
    BLOCK_START: tl.constexpr,
    BLOCK: tl.constexpr,
    DOCS: tl.constexpr,
    GATE_DOT: tl.constexpr,
):
    """Decay from a block's reference token to each row, [rows, M]; 0 for rows before the block, which read nothing of it."""
    middle = load_starts(start, b, t0, tl.zeros_like(token) + (BLOCK_START + BLOCK // 2 - 1), T, DOCS)
    reference = reference_token(first, middle, BLOCK_START, held, t0, BLOCK, DOCS)
    exponent = decay_exponent(token, reference, index, gate, GATE_DOT)
    return tl.where((token >= BLOCK_START)[:, None], tl.exp(tl.minimum(exponent, LARGEST_EXPONENT)), 0.0)


@triton.jit
def key_factor(
    index_first,
    start,
    b,
    t0,
    T,
    held,
    index,
    gate,
    BLOCK_START: tl.constexpr,
    BLOCK: tl.constexpr,
    DOCS: tl.constexpr,
    GATE_DOT: tl.constexpr,
):
    """Decay from each write of a block to the block's reference token, [C, M]; 0 outside of the block."""
    middle = load_starts(start, b, t0, tl.zeros_like(index) + (BLOCK_START + BLOCK // 2 - 1), T, DOCS)
    reference = reference_token(index_first, middle, BLOCK_START, held, t0, BLOCK, DOCS)
    exponent = decay_exponent(index, reference, index, gate, GATE_DOT)
    inside = (index >= BLOCK_START) & (index < BLOCK_START + BLOCK)
    return tl.where(inside[:, None], tl.exp(tl.minimum(-exponent, LARGEST_EXPONENT)), 0.0)


@triton.jit
def log_mass_rows(token, first, index, index_first, exact_gate, log_before, continues, GATE_DOT: tl.constexpr):
    """Sum of the log-gates written to each slot up to each row, in its document: [rows, M]."""
    summed = (index[None, :] <= token[:, None]) & (index_first[None, :] == first[:, None])
    log_mass = tl.dot(tl.where(summed, 1.0, 0.0), exact_gate, input_precision=GATE_DOT)
    return log_mass + tl.where(continues[:, None], log_before[None, :], 0.0)


@triton.jit
def biased_logits(logits, log_mass, anything_written, slot, M: tl.constexpr, BM: tl.constexpr, EMPTY: tl.constexpr):
    """Slot logits (base 2) under the convention for empty slots. EMPTY 0: attend, 1: mask, 2: weight."""
    if EMPTY == 1:
        logits = tl.where(anything_written[:, None], logits, float("-inf"))
    if EMPTY == 2:
        mass = write_strength(log_mass)
        holds = mass > SMALLEST_NORMAL
        logits = tl.where(holds, logits + tl.log2(tl.where(holds, mass, 1.0)), float("-inf"))
    if M % BM != 0:
        logits = tl.where((slot < M)[None, :], logits, float("-inf"))
    return logits
