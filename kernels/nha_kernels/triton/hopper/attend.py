"""Slots and window of 64 tokens and four query heads of a KV head, in Gluon: 256 rows share slots, keys and values in shared memory.

One warp group takes a subtile: 16 tokens x 4 heads, 64 rows, with a reference of its own for the decays. A warp loads by the tensor memory
accelerator. A program goes through several chunks, and every buffer is filled for the next chunk as soon as its last reader is done with
it, so that loads and the phases of the four groups overlap:

    buffer              its readers are done          of
    keys, slot keys     after scores and slot logits  all groups
    rotated keys        after the window's logits     all groups
    queries             after the window's logits     each group; raw, then rotated in place
    values, slot values after the output              all groups
    writes              after the output              each group; the output passes through it on its way to device memory
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6 has the second name


@gluon.constexpr_function
def _accumulator(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def _swizzled(rank):
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@gluon.jit
def _rows_as(x, COLUMNS: gl.constexpr):
    return gl.convert_layout(x, gl.SliceLayout(1, _accumulator(COLUMNS)))


@gluon.jit
def _window_logits(queries, keys, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Unscaled logits of rows FIRST .. FIRST + COUNT - 1 of the chunk before and the chunk itself, not waited for."""
    zeros = gl.zeros([64, COUNT], gl.float32, _accumulator(COUNT))
    return warpgroup_mma(queries, keys.slice(FIRST, COUNT, dim=0).permute((1, 0)), zeros, use_acc=False)


@gluon.jit
def _in_window(e, c0, SUBTILE: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, R: gl.constexpr):
    """-inf for rows that are not in the window."""
    layout: gl.constexpr = _accumulator(COUNT)
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, layout)) // R + 16 * SUBTILE
    row = gl.arange(0, COUNT, layout=gl.SliceLayout(0, layout)) + FIRST - 64
    seen = (row[None, :] <= token[:, None]) & (row[None, :] > token[:, None] - 64) & (c0 + row >= 0)[None, :]
    return gl.where(seen, e, float("-inf"))


@gluon.jit
def _place(H: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr):
    """Batch row, KV head, first query head and row of `slots` of this program. Heads are neighbours in the grid: they share the cache."""
    bh = gl.program_id(0) // PARTS
    return bh // H, bh % H, gl.program_id(0) % (H * PARTS) * R, bh


@gluon.jit
def _half(buffers, index, HALF: gl.constexpr):
    """One of the two [64, 128] that a buffer holds."""
    return buffers.index(index)._reinterpret(gl.bfloat16, [2, 64, 128], _swizzled(2)).index(HALF)


@gluon.jit
def _query_buffer(buffers, zero, GROUP: gl.constexpr, R: gl.constexpr):
    return buffers.index(4 + GROUP // 2 + zero)._reinterpret(gl.bfloat16, [2, 1, 16, R, 128], _swizzled(4)).index(GROUP % 2)


@gluon.jit
def _write_buffer(buffers, zero, GROUP: gl.constexpr, R: gl.constexpr):
    return buffers.index(6 + zero)._reinterpret(gl.bfloat16, [4, 1, 16, R, 64], _swizzled(4)).index(GROUP)


@gluon.jit
def _fill_keys(k_desc, slots_desc, key_buffer, slot_key_buffer, bar, token, at_slots, b, h, there):
    mbarrier.expect(bar, 2 * 16384, pred=there)
    tma.async_copy_global_to_shared(k_desc, [b, token - 64, h * 128], bar, key_buffer, pred=there)
    tma.async_copy_global_to_shared(slots_desc, [at_slots, 0], bar, slot_key_buffer, pred=there)


@gluon.jit
def _fill_rotated(rotated_desc, buffer, bar, n, b, h, there):
    mbarrier.expect(bar, 2 * 16384, pred=there)
    tma.async_copy_global_to_shared(rotated_desc, [b, n * 64, h * 128], bar, buffer, pred=there)


@gluon.jit
def _fill_values(v_desc, slots_desc, value_buffer, slot_value_buffer, bar, token, at_slots, b, h, there):
    mbarrier.expect(bar, 3 * 16384, pred=there)
    tma.async_copy_global_to_shared(slots_desc, [at_slots, 128], bar, slot_value_buffer, pred=there)
    tma.async_copy_global_to_shared(v_desc, [b, token - 64, h * 128], bar, value_buffer, pred=there)


@gluon.jit
def _fill_queries(q_desc, buffer, bar, token, b, first_head, there):
    mbarrier.expect(bar, 16384, pred=there)
    tma.async_copy_global_to_shared(q_desc, [b, token, first_head, 0], bar, buffer, pred=there)


@gluon.jit
def _fill_writes(writes_desc, buffer, bar, at_chunk, there, SUBTILE: gl.constexpr):
    mbarrier.expect(bar, 8192, pred=there)
    tma.async_copy_global_to_shared(writes_desc, [at_chunk * 160 + 8 * SUBTILE * (SUBTILE + 1), 0], bar, buffer, pred=there)


@gluon.jit
def _attend_subtiles(call, H: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr, EMPTY: gl.constexpr, GROUP: gl.constexpr):
    """The subtiles of warp group GROUP, chunk by chunk."""
    tensors, sizes, buffers, bars = call
    k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc, angles, to_row_at, to_reference_at, lse = tensors
    T, first_chunk, num_chunks, zero, scale = sizes
    m64: gl.constexpr = _accumulator(64)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=m64, k_width=2)
    rows: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])  # a thread holds four heads of a token
    by_head: gl.constexpr = gl.BlockedLayout([1, 2, 8], [4, 2, 4], [4, 1, 1], [2, 1, 0])
    # Rows of the window: 16 GROUP .. 16 GROUP + 79 of the 128, in three pieces that start at multiples of their sizes.
    A: gl.constexpr = 32 * ((GROUP + 1) // 2)
    B: gl.constexpr = A + 32
    E: gl.constexpr = 64 if GROUP == 0 else 16 if GROUP == 1 else 96 if GROUP == 2 else 48

    row = gl.arange(0, 64, layout=gl.SliceLayout(1, m64))
    token = row // R
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, m64))
    zeros = gl.zeros([64, 64], gl.float32, m64)
    logit_scale = scale * LOG2_E
    b, h, first_head, bh = _place(H, R, PARTS)
    keys_full, rotated_full, values_full = bars.index(0), bars.index(1), bars.index(2)
    keys_free, rotated_free, values_free = bars.index(3), bars.index(4), bars.index(5)
    queries_full, writes_full = bars.index(6 + GROUP), bars.index(10 + GROUP)
    phase = gl.to_tensor(0)
    for n in range(gl.program_id(1), num_chunks, gl.num_programs(1)):
        # Where a buffer lies is formed in every turn, in uniform registers: kept over the loop it would take those that values need.
        here = n & zero
        keys, slot_keys = _half(buffers, here, 0), _half(buffers, here, 1)
        key_buffer = keys._reinterpret(gl.bfloat16, [1, 64, 128], _swizzled(3))
        rotated_buffer = buffers.index(1 + here)._reinterpret(gl.bfloat16, [1, 128, 128], _swizzled(3))
        value_buffer = buffers.index(2 + here)._reinterpret(gl.bfloat16, [1, 128, 128], _swizzled(3))
        slot_values = _half(buffers, 3 + here, 0)
        query_buffer = _query_buffer(buffers, here, GROUP, R)
        write_buffer = _write_buffer(buffers, here, GROUP, R)
        rotated_keys, values = buffers.index(1 + here), buffers.index(2 + here)
        queries = query_buffer._reinterpret(gl.bfloat16, [64, 128], _swizzled(2))
        write = write_buffer._reinterpret(gl.bfloat16, [64, 64], _swizzled(2))
        at_chunk = bh * num_chunks + n
        c0 = (first_chunk + n) * 64
        t0 = c0 + 16 * GROUP
        later = n > gl.program_id(1)
        step = gl.num_programs(1)
        more = n + step < num_chunks
        if GROUP == 1:
            mbarrier.wait(rotated_free, phase ^ 1, pred=later)
            _fill_rotated(rotated_desc, rotated_buffer, rotated_full, n, b, h, later)
        if GROUP == 3:
            mbarrier.wait(values_free, phase ^ 1, pred=later)
            _fill_values(v_desc, slots_desc, value_buffer, slot_values, values_full, c0, at_chunk * 64, b, h, later)
        to_row = gl.load(to_row_at + (at_chunk.to(gl.int64) * 64 + 16 * GROUP) * 64 + token[:, None] * 64 + column[None, :])
        to_reference = gl.load(to_reference_at + (at_chunk.to(gl.int64) * 4 + GROUP) * 64 + column)[None, :]

        # Slots: those at the border of the chunk, and the chunk's own writes up to the subtile's end.
        mbarrier.wait(queries_full, phase)
        mbarrier.wait(keys_full, phase)
        scores = warpgroup_mma(queries, keys.permute((1, 0)), zeros, use_acc=False)
        e = warpgroup_mma(queries, slot_keys.permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(keys_free, count=1)
        pairs = column[None, :] <= 16 * GROUP + token[:, None]
        scores = gl.convert_layout(gl.where(pairs, scores, 0.0).to(gl.bfloat16), operand)
        mbarrier.wait(writes_full, phase)
        to_row = to_row.to(gl.float32)
        e = warpgroup_mma(scores, write, e * to_reference.to(gl.float32)) * to_row
        if EMPTY == 1:  # nothing has been written before the window is full
            e = gl.where((t0 + token >= 64)[:, None], e, float("-inf"))
        largest = gl.max(e, 1) * logit_scale
        if EMPTY == 1:
            largest = gl.maximum(largest, -1e30)
        p = gl.exp2(e * logit_scale - largest[:, None])
        total = gl.sum(p, 1)
        p *= to_row
        p = p.to(gl.bfloat16)
        weights = warpgroup_mma(gl.convert_layout(p, operand), write.permute((1, 0)), zeros, use_acc=False)
        p = gl.convert_layout(p * to_reference, operand)
        weights = gl.convert_layout(gl.where(pairs, weights, 0.0).to(gl.bfloat16), operand)

        # Rotated queries take the place of the raw ones.
        sync()
        for piece in gl.static_range(2):
            first, second = queries.slice(piece * 32, 32, dim=1), queries.slice(64 + piece * 32, 32, dim=1)
            x1 = gl.convert_layout(gl.reshape(first.load(rows), [16, R, 32]), by_head).to(gl.float32)
            x2 = gl.convert_layout(gl.reshape(second.load(rows), [16, R, 32]), by_head).to(gl.float32)
            place = n * 64 + 16 * GROUP + gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(1, by_head)))
            pair = piece * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, by_head)))
            at_angle = place[:, None] * 128 + pair[None, :]
            c = gl.expand_dims(gl.load(angles + at_angle).to(gl.float32), 1)
            s = gl.expand_dims(gl.load(angles + at_angle + 64).to(gl.float32), 1)
            first.store(gl.reshape((x1 * c - x2 * s).to(gl.bfloat16), [64, 32]))
            second.store(gl.reshape((x2 * c + x1 * s).to(gl.bfloat16), [64, 32]))
        fence_async_shared()
        sync()
        if GROUP == 0:
            mbarrier.wait(keys_free, phase, pred=more)
            _fill_keys(k_desc, slots_desc, key_buffer, slot_keys, keys_full, c0 + step * 64, (at_chunk + step) * 64, b, h, more)

        # Window.
        mbarrier.wait(rotated_full, phase)
        ea = _window_logits(queries, rotated_keys, A, 32)
        eb = _window_logits(queries, rotated_keys, B, 32)
        ec = _window_logits(queries, rotated_keys, E, 16)
        mbarrier.arrive(rotated_free, count=1)
        _fill_queries(q_desc, query_buffer, queries_full, t0 + step * 64, b, first_head, more)
        ea = _in_window(ea, c0, GROUP, A, 32, R)
        eb = _in_window(eb, c0, GROUP, B, 32, R)
        ec = _in_window(ec, c0, GROUP, E, 16, R)
        new = gl.maximum(_rows_as(gl.max(gl.maximum(ea, eb), 1), 64), _rows_as(gl.max(ec, 1), 64))
        new = gl.maximum(new * logit_scale, largest)
        rescale = gl.exp2(largest - new)
        of_pieces = _rows_as(new, 32)[:, None]
        ea = gl.exp2(ea * logit_scale - of_pieces)
        eb = gl.exp2(eb * logit_scale - of_pieces)
        ec = gl.exp2(ec * logit_scale - _rows_as(new, 16)[:, None])
        total = total * rescale + _rows_as(gl.sum(ea + eb, 1), 64) + _rows_as(gl.sum(ec, 1), 64)
        ea = gl.convert_layout(ea.to(gl.bfloat16), operand)
        eb = gl.convert_layout(eb.to(gl.bfloat16), operand)
        ec = gl.convert_layout(ec.to(gl.bfloat16), operand)

        # Values, 64 channels at a time, which then pass through the place of the writes.
        scale_out = (1 / total)[:, None]
        mbarrier.wait(values_full, phase)
        for half in gl.static_range(2):
            of_values = values.slice(half * 64, 64, dim=1)
            acc = warpgroup_mma(p, slot_values.slice(half * 64, 64, dim=1), zeros, use_acc=False)
            acc = warpgroup_mma(weights, of_values.slice(0, 64, dim=0), acc)
            acc *= rescale[:, None]
            acc = warpgroup_mma(ea, of_values.slice(A, 32, dim=0), acc)
            acc = warpgroup_mma(eb, of_values.slice(B, 32, dim=0), acc)
            acc = warpgroup_mma(ec, of_values.slice(E, 16, dim=0), acc)
            if half == 1:
                mbarrier.arrive(values_free, count=1)
                tma.store_wait(0)
            sync()
            write.store((acc * scale_out).to(gl.bfloat16))
            fence_async_shared()
            sync()
            tma.async_copy_shared_to_global(out_desc, [b, t0, first_head, half * 64], write_buffer)
        at_lse = lse + (b * T + t0).to(gl.int64) * (H * PARTS * R) + first_head
        gl.store(at_lse + token * (H * PARTS * R) + row % R, (new + gl.log2(total)) * LN_2, mask=t0 + token < T)
        tma.store_wait(0)
        _fill_writes(writes_desc, write, writes_full, at_chunk + step, more, GROUP)
        phase ^= 1


@gluon.jit(do_not_specialize=["first_chunk", "num_chunks", "zero"])
def attend_chunks(
    k_desc,  # [B, T, H*K] blocks of 64 tokens
    rotated_desc,  # [B, 64 + slab, H*K] blocks of 128
    v_desc,  # [B, T, H*V] blocks of 128
    slots_desc,  # [B*H*chunks*M, K+V] slots before each chunk, blocks [64, 128]
    writes_desc,  # [B*H*chunks*160, M]
    q_desc,  # [B, T, HQ, K] blocks of 16 tokens and 4 heads
    out_desc,  # [B, T, HQ, V] likewise, and of 64 channels
    angles,  # [slab, 2, K/2] cosines and sines
    to_row,  # [B*H, chunks, 64, M]
    to_reference,  # [B*H, chunks, 4, M]
    lse,  # [B, T, HQ]
    T,
    first_chunk,  # of the slab
    num_chunks,  # of the slab
    zero,  # 0, which the compiler must not know
    scale,
    H: gl.constexpr,
    R: gl.constexpr,  # query heads of a tile
    PARTS: gl.constexpr,  # tiles to a KV head
    EMPTY: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    buffers = gl.allocate_shared_memory(gl.bfloat16, [7, 128, 128], _swizzled(2))
    bars = gl.allocate_shared_memory(gl.int64, [14, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(3 + i), count=4)
    for i in gl.static_range(8):
        mbarrier.init(bars.index(6 + i), count=1)
    fence_async_shared()
    sync()
    b, h, first_head, bh = _place(H, R, PARTS)
    n = gl.program_id(1)
    at_chunk = bh * num_chunks + n
    c0 = (first_chunk + n) * 64
    there = n < num_chunks
    for i in gl.static_range(4):
        _fill_queries(q_desc, _query_buffer(buffers, 0, i, R), bars.index(6 + i), c0 + 16 * i, b, first_head, there)
    keys = _half(buffers, 0, 0)._reinterpret(gl.bfloat16, [1, 64, 128], _swizzled(3))
    _fill_keys(k_desc, slots_desc, keys, _half(buffers, 0, 1), bars.index(0), c0, at_chunk * 64, b, h, there)
    for i in gl.static_range(4):
        write = _write_buffer(buffers, 0, i, R)._reinterpret(gl.bfloat16, [64, 64], _swizzled(2))
        _fill_writes(writes_desc, write, bars.index(10 + i), at_chunk, there, i)
    rotated_keys = buffers.index(1)._reinterpret(gl.bfloat16, [1, 128, 128], _swizzled(3))
    _fill_rotated(rotated_desc, rotated_keys, bars.index(1), n, b, h, there)
    values = buffers.index(2)._reinterpret(gl.bfloat16, [1, 128, 128], _swizzled(3))
    _fill_values(v_desc, slots_desc, values, _half(buffers, 3, 0), bars.index(2), c0, at_chunk * 64, b, h, there)
    T, first_chunk, num_chunks, zero = gl.to_tensor(T), gl.to_tensor(first_chunk), gl.to_tensor(num_chunks), gl.to_tensor(zero)
    G0: gl.constexpr = 0
    G1: gl.constexpr = 1
    G2: gl.constexpr = 2
    G3: gl.constexpr = 3
    tensors = (k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc, angles, to_row, to_reference, lse)
    call = (tensors, (T, first_chunk, num_chunks, zero, scale), buffers, bars)
    gl.warp_specialize(
        [
            (_attend_subtiles, (call, H, R, PARTS, EMPTY, G0)),
            (_attend_subtiles, (call, H, R, PARTS, EMPTY, G1)),
            (_attend_subtiles, (call, H, R, PARTS, EMPTY, G2)),
            (_attend_subtiles, (call, H, R, PARTS, EMPTY, G3)),
        ],
        [4, 4, 4],
        [REGISTERS, REGISTERS, REGISTERS],
    )
