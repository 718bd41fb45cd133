"""Per chunk of 64 tokens and KV head: every factor that is formed from the gates alone, once for all query heads. In Gluon: a thread
takes one slot and all tokens of the chunk, so that sums over tokens need neither shuffles nor barriers.

Written i: the token that leaves the window at query i of the chunk, the token before it by W = 64, so one of the chunk before this one.
A decay from a write to a query is exp(sum of the log-gates between). A subtile of 16 queries takes its decays relative to a reference
token in its middle: `writes` holds strength * exp(reference - write), `to_row` exp(query - reference). With gates of at least -8 neither
factor exceeds e^64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common import LENGTHS

CHUNK = 64  # tokens; also the window
SUBTILES = 4  # of 16 queries
WRITE_ROWS = 160  # 16 + 32 + 48 + 64: a subtile sees the writes up to its own last query
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _take_block(
    at_gates, base, query, T, carried, exact,
    BLOCK: gl.constexpr, H: gl.constexpr, M: gl.constexpr, FLOOR: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Sixteen tokens: strength of the writes, sums of the log2-gates from the chunk's border, to the block's reference, and over the chunk
    so far; the last with and without the gates' floor."""
    index = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    slot = gl.arange(0, M, layout=gl.SliceLayout(0, layout))
    token = query + BLOCK * 16 + index
    pointers = at_gates + (base + (BLOCK * 16 + index).to(gl.int64) * H)[:, None] * M + slot[None, :]
    gate = gl.load(pointers, mask=((token >= 64) & (token < T))[:, None], other=0.0)
    exact += gl.sum(gl.maximum(gate, -40.0), 0)
    gate = gl.maximum(gate, FLOOR)
    # 1 - exp(gate), with all digits near 0, as `write_strength` in common.py
    series = -gate * (1 + gate * (1 / 2 + gate * (1 / 6 + gate * (1 / 24 + gate * (1 / 120 + gate * (1 / 720 + gate * (1 / 5040)))))))
    strength = gl.where(gate > -0.35, series, 1 - gl.exp2(gate * LOG2_E))
    gate *= LOG2_E
    running = gl.associative_scan(gate, 0, _add) + carried[None, :]
    reference = carried + gl.sum(gl.where((index < 8)[:, None], gate, 0.0), 0)
    carried += gl.sum(gate, 0)
    return strength, running, reference, carried, exact


@gluon.jit
def _store_block(at, strength, exponent, BLOCK: gl.constexpr, M: gl.constexpr, layout: gl.constexpr):
    index = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    slot = gl.arange(0, M, layout=gl.SliceLayout(0, layout))
    gl.store(at + (BLOCK * 16 + index)[:, None] * M + slot[None, :], (strength * gl.exp2(exponent)).to(at.dtype.element_ty))


@gluon.jit
def _store_angle(at_cos, at_sin, position, frequency):
    angle = position.to(gl.float64) * frequency  # in float32 it is off by 0.03 rad at a million tokens
    gl.store(at_cos, gl.cos(angle).to(gl.float32))
    gl.store(at_sin, gl.sin(angle).to(gl.float32))


@gluon.jit(do_not_specialize=LENGTHS)
def form_factors(
    g,  # [B, T, H, M]
    writes,  # [B*H, chunks, WRITE_ROWS, M] a subtile's writes, one subtile after another
    to_row,  # [B*H, chunks, 64, M]
    to_reference,  # [B*H, chunks, SUBTILES, M] decay from the border of the chunk to the subtile's reference
    weights,  # [B*H, chunks, 64, M] strength and decay of the writes up to the chunk's end
    decay,  # [B*H, chunks, M] log2 of the slots' decay over the chunk
    log_decay,  # [B*H, chunks, M] sum of the log-gates over the chunk
    frequencies,  # [PAIRS] float64
    border_cos,  # [1 + chunks, P] cosines of the position at which a chunk begins; the first row is for the chunk before the slab
    border_sin,
    T,
    heads,  # B * H
    first_chunk,  # of the slab
    num_chunks,  # of the slab
    H: gl.constexpr,
    M: gl.constexpr,
    P: gl.constexpr,  # K / 2
    PAIRS: gl.constexpr,  # of channels that rotate
    FLOOR: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [1, M // 32], [0, 1])
    n, bh = gl.program_id(0) // heads, (gl.program_id(0) % heads).to(gl.int64)
    b, h = bh // H, bh % H
    query = (first_chunk + n) * 64
    if bh == 0:
        pair = gl.arange(0, P, layout=gl.SliceLayout(0, layout))
        frequency = gl.load(frequencies + pair, mask=pair < PAIRS, other=0.0)
        _store_angle(border_cos + (n + 1) * P + pair, border_sin + (n + 1) * P + pair, query, frequency)
        if n == 0:
            _store_angle(border_cos + pair, border_sin + pair, query - 64, frequency)
    base = (b * T + query - 64) * H + h
    slot = gl.arange(0, M, layout=gl.SliceLayout(0, layout))
    nothing = gl.zeros([M], gl.float32, gl.SliceLayout(0, layout))
    B0: gl.constexpr = 0
    B1: gl.constexpr = 1
    B2: gl.constexpr = 2
    B3: gl.constexpr = 3
    w0, r0, f0, carried, exact = _take_block(g, base, query, T, nothing, nothing, B0, H, M, FLOOR, layout)
    w1, r1, f1, carried, exact = _take_block(g, base, query, T, carried, exact, B1, H, M, FLOOR, layout)
    w2, r2, f2, carried, exact = _take_block(g, base, query, T, carried, exact, B2, H, M, FLOOR, layout)
    w3, r3, f3, carried, exact = _take_block(g, base, query, T, carried, exact, B3, H, M, FLOOR, layout)
    at = bh * num_chunks + n
    gl.store(decay + at * M + slot, carried)
    gl.store(log_decay + at * M + slot, exact)
    at_reference = to_reference + at * (4 * M) + slot
    gl.store(at_reference, gl.exp2(f0).to(to_reference.dtype.element_ty))
    gl.store(at_reference + M, gl.exp2(f1).to(to_reference.dtype.element_ty))
    gl.store(at_reference + 2 * M, gl.exp2(f2).to(to_reference.dtype.element_ty))
    gl.store(at_reference + 3 * M, gl.exp2(f3).to(to_reference.dtype.element_ty))
    at_row = to_row + at * (64 * M)
    _store_block(at_row, 1.0, r0 - f0[None, :], B0, M, layout)
    _store_block(at_row, 1.0, r1 - f1[None, :], B1, M, layout)
    _store_block(at_row, 1.0, r2 - f2[None, :], B2, M, layout)
    _store_block(at_row, 1.0, r3 - f3[None, :], B3, M, layout)
    at_write = writes + at * (160 * M)
    _store_block(at_write, w0, f0[None, :] - r0, B0, M, layout)
    at_write += 16 * M
    _store_block(at_write, w0, f1[None, :] - r0, B0, M, layout)
    _store_block(at_write, w1, f1[None, :] - r1, B1, M, layout)
    at_write += 32 * M
    _store_block(at_write, w0, f2[None, :] - r0, B0, M, layout)
    _store_block(at_write, w1, f2[None, :] - r1, B1, M, layout)
    _store_block(at_write, w2, f2[None, :] - r2, B2, M, layout)
    at_write += 48 * M
    _store_block(at_write, w0, f3[None, :] - r0, B0, M, layout)
    _store_block(at_write, w1, f3[None, :] - r1, B1, M, layout)
    _store_block(at_write, w2, f3[None, :] - r2, B2, M, layout)
    _store_block(at_write, w3, f3[None, :] - r3, B3, M, layout)
    at_weight = weights + at * (64 * M)
    _store_block(at_weight, w0, carried[None, :] - r0, B0, M, layout)
    _store_block(at_weight, w1, carried[None, :] - r1, B1, M, layout)
    _store_block(at_weight, w2, carried[None, :] - r2, B2, M, layout)
    _store_block(at_weight, w3, carried[None, :] - r3, B3, M, layout)
