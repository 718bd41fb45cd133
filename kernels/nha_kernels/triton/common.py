"""Pieces that all kernels share: tiles of gates, decays that cannot overflow, rotation in registers.

Words used in every kernel of this folder:

    chunk      C consecutive queries of one KV head: one program. The state (slots) before each chunk is in device memory.
    block      `BLOCK` of the chunk's tokens whose pairwise decays are factored around one reference token.
    row        a query head at a token: row = token * RP + head of the group, so the group shares keys, values, gates and slots.
    extended   index into keys, values and gates: `held` rows of the memory's window, then the T tokens of this call.
    written i  the token that leaves the window at query i of the chunk: extended row held + chunk_start + i - W.
    DOCS       0: one document that starts at extended row 0; 1: one per batch row, it starts at start[b];
               2: packed documents, start[t] for each query.

A decay between two tokens is exp(sum of the log-gates between them). A tile of them is a product of a row factor and a key factor,
both relative to a reference token in the middle of a block. With gates of at least GATE_FLOOR and BLOCK / 2 * GATE_FLOOR >= -64
neither factor exceeds e^64. Floors: -8 with 16 tokens (bf16 and fp16, a decay of 3e-4 instead of less), -16 with 8 tokens (fp32, 1e-7).
"""

import triton
import triton.language as tl

# Run-time arguments that follow from lengths. Triton would compile a kernel anew where one of them is 1 or a multiple of 16. T, the held
# rows, their sum E and W are left to it: where all are multiples of 16, as in training, tiles end where the sequence does, which saves
# registers. So a kernel is compiled for such lengths and for others, not for each.
LENGTHS = ["first_chunk", "num_chunks", "num_segments", "chunks_per_segment", "num_offsets", "short_segments", "long_chunks", "N"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_EXPONENT = tl.constexpr(80.0)  # e^80 is finite in float32; larger exponents belong to masked pairs only


@triton.jit
def exp(x):
    """e^x, numbers below 1.2e-38 as 0. `tl.exp` keeps them, with three more instructions a number."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def write_strength(g):
    """1 - exp(g) for g <= 0, with all digits near 0."""
    # 1 - exp(g) = -g (1 + g/2 + g^2/6 + ...): constants, because a division costs ten instructions.
    series = -g * (1 + g * (1 / 2 + g * (1 / 6 + g * (1 / 24 + g * (1 / 120 + g * (1 / 720 + g * (1 / 5040)))))))
    return tl.where(g > -0.35, series, 1 - exp(g))


@triton.jit
def split_tf32(x):
    """x as the sum of two numbers, the first one exact in tf32, the second one 2^-10 of it or smaller: together they lose 2^-22."""
    leading = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return leading, x - leading


@triton.jit
def signed_sums(signs, x):
    """signs @ x for a float32 x and signs of 1, 0 and -1, to 2^-22 of the summands. `tf32x3` would take three products, not two."""
    leading, rest = split_tf32(x)
    return tl.dot(signs, leading, tl.dot(signs, rest, input_precision="tf32"), input_precision="tf32")


@triton.jit
def rounded_sums(signs, x, like):
    """signs @ x as exact as products of the inputs' dtype (that of `like`) are: with 16-bit inputs x loses 2^-10 of its summands."""
    if like.dtype == tl.float32:
        y = signed_sums(signs, x)
    else:
        y = tl.dot(signs, x, input_precision="tf32")
    return y


@triton.jit
def load_starts(start, b, chunk_start, index, T, DOCS: tl.constexpr):
    """Extended row at which the document of query `chunk_start + index` begins. Queries behind the last repeat it."""
    if DOCS == 0:
        first = tl.zeros_like(index)
    elif DOCS == 1:
        first = tl.zeros_like(index) + tl.load(start + b)
    else:
        first = tl.load(start + tl.minimum(chunk_start + index, T - 1))
    return first


@triton.jit
def continues_state(first, held, chunk_start):
    """Whether a query's document began before its chunk, so that the state before the chunk is its own."""
    return first <= held + tl.maximum(chunk_start - 1, 0)


@triton.jit
def channel_halves(index, K: tl.constexpr, HALF: tl.constexpr):
    """Channels of the two halves that rotate against each other, HALF pairs; the channels that do not rotate fill both up."""
    if HALF == K // 2:
        return index, index + K // 2
    return tl.where(index < HALF, index, index + HALF), tl.where(index < HALF, index + HALF, index + K // 2)


@triton.jit
def rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def unrotate(first, second, cos, sin):
    """The transpose of `rotate`: what gradients go through."""
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def reference_token(first, first_at_middle, block_start, held, chunk_start, BLOCK: tl.constexpr, DOCS: tl.constexpr):
    """Token of the chunk around which a token's decays in a block are taken: the middle, or the first one of its own document."""
    middle = block_start + BLOCK // 2 - 1
    reference = tl.zeros_like(first) + middle
    if DOCS == 2:
        reference = tl.where(first == first_at_middle, reference, tl.maximum(block_start, first - held - chunk_start))
    return reference


@triton.jit
def decay_exponent(token, reference, index, g):
    """Sum of the log-gates behind `reference` up to `token`, negative of it where the token comes first: [tokens, M].

    Summed directly as a product with a matrix of 1, 0 and -1, so gates outside of the stretch do not even leave a rounding error.
    """
    behind = (index[None, :] > reference[:, None]) & (index[None, :] <= token[:, None])
    before = (index[None, :] > token[:, None]) & (index[None, :] <= reference[:, None])
    signs = tl.where(behind, 1.0, tl.where(before, -1.0, 0.0))
    return signed_sums(signs, g)


@triton.jit
def load_gates(at, row, slot, valid, M: tl.constexpr):
    """Log-gates [rows, slots]; 0 (no decay, no write) where not valid."""
    return tl.load(at + row[:, None] * M + slot[None, :], mask=valid[:, None] & (slot < M)[None, :], other=0.0)
