"""Tiles of a chunk: loads, logits and pair decays, the same in forward and backward. Words: see common.py."""

import triton
import triton.language as tl

from .common import LARGEST_EXPONENT, channel_halves, decay_exponent, exp, load_starts, reference_token, rotate, signed_sums, write_strength

SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def chunk_and_head(num_chunks):
    """Of this program. The KV heads of a chunk are neighbours: together they read whole rows of the sequence."""
    heads = tl.num_programs(0) // num_chunks
    return tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)


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
def load_group(
    at, num_tokens, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, N: tl.constexpr, AGAIN: tl.constexpr = False
):
    """Rows of a group of query heads, [C * RP, N]; tokens from `num_tokens` on are 0.

    Addressed as [tokens, heads, channels], so that the distances between a thread's rows are constants of the instructions and not
    addresses in registers. AGAIN marks a second load of the same tile: its hint differs, or the compiler would keep the first one in
    registers until here.
    """
    token = tl.arange(0, C)[:, None, None]
    head = tl.arange(0, RP)[None, :, None]
    pointers = at + token * (H * R * N) + head * N + tl.arange(0, N)[None, None, :]
    ok = token < num_tokens
    if R < RP:
        ok = ok & (head < R)
    if AGAIN:
        x = tl.load(pointers, mask=ok, other=0.0, eviction_policy="evict_last")
    else:
        x = tl.load(pointers, mask=ok, other=0.0)
    return tl.reshape(x, (C * RP, N))


@triton.jit
def load_group_halves(
    at, num_tokens, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr
):
    """As `load_group`, as the two halves that rotate against each other."""
    first, second = channel_halves(tl.arange(0, K // 2), K, HALF)
    token = tl.arange(0, C)[:, None, None]
    head = tl.arange(0, RP)[None, :, None]
    pointers = at + token * (H * R * K) + head * K
    ok = token < num_tokens
    if R < RP:
        ok = ok & (head < R)
    x1 = tl.load(pointers + first[None, None, :], mask=ok, other=0.0)
    x2 = tl.load(pointers + second[None, None, :], mask=ok, other=0.0)
    return tl.reshape(x1, (C * RP, K // 2)), tl.reshape(x2, (C * RP, K // 2))


@triton.jit
def load_tile(at, num_rows, ROWS: tl.constexpr, N: tl.constexpr, AGAIN: tl.constexpr = False):
    """Consecutive rows [ROWS, N]; those from `num_rows` on are 0. AGAIN as in `load_group`."""
    row = tl.arange(0, ROWS)[:, None]
    pointers = at + row * N + tl.arange(0, N)[None, :]
    if AGAIN:
        return tl.load(pointers, mask=row < num_rows, other=0.0, eviction_policy="evict_last")
    return tl.load(pointers, mask=row < num_rows, other=0.0)


@triton.jit
def load_rows_again(at, row, row_ok, N: tl.constexpr):
    """As `load_rows`, for a second load of the same tile: see `load_group`."""
    return tl.load(at + row[:, None] * N + tl.arange(0, N)[None, :], mask=row_ok[:, None], other=0.0, eviction_policy="evict_last")


@triton.jit
def fold(logits, largest, total, acc):
    """One step of the online softmax (base 2): probabilities relative to the new maximum, and the rescaled sums."""
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    p = tl.exp2(logits - finite[:, None])
    rescale = tl.exp2(largest - finite)
    return p, new_largest, total * rescale + tl.sum(p, 1), acc * rescale[:, None]


@triton.jit
def load_angles(cos, sin, offset, K: tl.constexpr):
    at = offset[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :]
    return tl.load(cos + at).to(tl.float32), tl.load(sin + at).to(tl.float32)


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
    product = tl.dot(a1, tl.trans(b1), input_precision="tf32x3")
    return tl.dot(a2, tl.trans(b2), product, input_precision="tf32x3")


@triton.jit
def to_decay_dtype(x, like):
    """A decayed operand reaches e^64, so with fp16 inputs it is bf16; else it has the dtype of `like`, the inputs."""
    if like.dtype == tl.float16:
        y = x.to(tl.bfloat16)
    else:
        y = x.to(like.dtype)
    return y


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
def row_decays(
    token,
    first,
    index,
    index_first,
    gate,
    continues,
    BLOCK: tl.constexpr,
    DOCS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Decay of the slots before the chunk at each row, [rows, M], in its document; also its exponent and `at_reference` [M].

    With ONE_BLOCK the decay is the product of the row factor of that block and `at_reference`, the decay at the reference token; only the
    row factor is returned, because a second tile of this size would cost registers. See `decayed`.
    """
    summed = index[None, :] <= token[:, None]
    if DOCS == 2:
        summed = summed & (index_first[None, :] == first[:, None])
    exponent = signed_sums(tl.where(summed, 1.0, 0.0), gate)
    reference = tl.sum(tl.where((index < BLOCK // 2)[:, None], gate, 0.0), 0)
    if ONE_BLOCK:
        decay = exp(exponent - reference[None, :])
    else:
        decay = exp(exponent)
    if DOCS == 2:
        decay = tl.where(continues[:, None], decay, 0.0)
    return exponent, decay, exp(reference)


@triton.jit
def decayed(x, from_state, at_reference, ONE_BLOCK: tl.constexpr):
    """x times the decay of the slots before the chunk."""
    if ONE_BLOCK:
        x = x * at_reference[None, :]
    return x * from_state


@triton.jit
def pair_factors(
    exponent,
    from_state,
    token,
    first,
    index,
    index_first,
    gate,
    start,
    b,
    t0,
    T,
    held,
    BLOCK_START: tl.constexpr,
    BLOCK: tl.constexpr,
    DOCS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Decay from a write of the block to a row as a product: to_row [rows, M] from the block's reference token on, 0 for rows before the
    block; to_reference [C, M] up to it, 0 outside of the block."""
    middle = BLOCK_START + BLOCK // 2 - 1
    if (DOCS == 2) or (BLOCK < 16):
        # A reference per document, and no difference of sums: exact isolation, and float32 without cancellation.
        at_middle = load_starts(start, b, t0, tl.zeros_like(index) + middle, T, DOCS)
        reference = reference_token(index_first, at_middle, BLOCK_START, held, t0, BLOCK, DOCS)
        key_exponent = decay_exponent(
            index,
            reference,
            index,
            gate,
        )
        at_middle = load_starts(start, b, t0, tl.zeros_like(token) + middle, T, DOCS)
        reference = reference_token(first, at_middle, BLOCK_START, held, t0, BLOCK, DOCS)
        to_row = exp(
            tl.minimum(
                decay_exponent(
                    token,
                    reference,
                    index,
                    gate,
                ),
                LARGEST_EXPONENT,
            )
        )
    else:
        at_reference = tl.sum(tl.where((index <= middle)[:, None], gate, 0.0), 0)
        key_exponent = tl.cumsum(gate, 0) - at_reference[None, :]
        if ONE_BLOCK:
            to_row = from_state
        else:
            to_row = exp(tl.minimum(exponent - at_reference[None, :], LARGEST_EXPONENT))
    to_reference = exp(tl.minimum(-key_exponent, LARGEST_EXPONENT))
    if BLOCK_START > 0:
        to_row = tl.where((token >= BLOCK_START)[:, None], to_row, 0.0)
        to_reference = tl.where((index >= BLOCK_START)[:, None], to_reference, 0.0)
    return to_row, tl.where((index < BLOCK_START + BLOCK)[:, None], to_reference, 0.0)


@triton.jit
def log_mass_rows(token, first, index, index_first, exact_gate, log_before, continues):
    """Sum of the log-gates written to each slot up to each row, in its document: [rows, M]."""
    summed = (index[None, :] <= token[:, None]) & (index_first[None, :] == first[:, None])
    log_mass = signed_sums(tl.where(summed, 1.0, 0.0), exact_gate)
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
