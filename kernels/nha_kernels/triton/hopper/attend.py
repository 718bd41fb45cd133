"""Slots and window of 64 tokens and four query heads of a KV head, in Gluon: 256 rows share slots, keys and values in shared memory.

One warp group takes a subtile: 16 tokens x 4 heads, 64 rows, with a reference of its own for the decays. A program goes through chunks;
what all groups read is loaded again for the next chunk as soon as the last group has read it, so loads and the groups' phases overlap:

    buffer              read by                                filled again for the next chunk by
    keys, slot keys     scores and slot logits                 group 0, before its window
    rotated keys        window logits                          group 1, at the beginning of the next chunk
    values              the output                             group 2, after its slots of the next chunk
    queries             raw, rotated, then the output's place  their group, after its output
    writes              slot logits, weights of the writes     their group, after these
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
GROUPS = 4  # warp groups
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
def _window_logits(queries, keys, c0, SUBTILE: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, R: gl.constexpr):
    """Unscaled logits of rows FIRST .. FIRST + COUNT - 1 of the chunk before and the chunk itself; -inf where not in the window."""
    layout: gl.constexpr = _accumulator(COUNT)
    e = warpgroup_mma(queries, keys.slice(FIRST, COUNT, dim=0).permute((1, 0)), gl.zeros([64, COUNT], gl.float32, layout), use_acc=False)
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, layout)) // R + 16 * SUBTILE
    row = gl.arange(0, COUNT, layout=gl.SliceLayout(0, layout)) + FIRST - 64
    seen = (row[None, :] <= token[:, None]) & (row[None, :] > token[:, None] - 64) & (c0 + row >= 0)[None, :]
    return gl.where(seen, e, float("-inf"))


@gluon.jit
def _fill_keys(k_desc, slots_desc, buffers, bar, at_chunk, token, b, h, there):
    mbarrier.expect(bar, 2 * 16384, pred=there)
    tma.async_copy_global_to_shared(k_desc, [b, token - 64, h * 128], bar, buffers[0], pred=there)
    tma.async_copy_global_to_shared(slots_desc, [at_chunk * 64, 0], bar, buffers[1], pred=there)


@gluon.jit
def _fill_rotated(rotated_desc, buffer, bar, n, b, h, there):
    mbarrier.expect(bar, 2 * 16384, pred=there)
    tma.async_copy_global_to_shared(rotated_desc, [b, n * 64, h * 128], bar, buffer, pred=there)


@gluon.jit
def _fill_values(v_desc, slots_desc, buffers, bar, at_chunk, token, b, h, there):
    mbarrier.expect(bar, 3 * 16384, pred=there)
    tma.async_copy_global_to_shared(slots_desc, [at_chunk * 64, 128], bar, buffers[1], pred=there)
    tma.async_copy_global_to_shared(v_desc, [b, token - 64, h * 128], bar, buffers[0], pred=there)


@gluon.jit
def _fill_queries(q_desc, buffer, bar, token, b, first_head, there):
    mbarrier.expect(bar, 16384, pred=there)
    tma.async_copy_global_to_shared(q_desc, [b, token, first_head, 0], bar, buffer, pred=there)


@gluon.jit
def _fill_writes(writes_desc, buffer, bar, at_chunk, there, SUBTILE: gl.constexpr):
    mbarrier.expect(bar, 8192, pred=there)
    tma.async_copy_global_to_shared(writes_desc, [at_chunk * 160 + 8 * SUBTILE * (SUBTILE + 1), 0], bar, buffer, pred=there)


@gluon.jit
def _attend_subtiles(
    k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc,
    cos, sin, to_row_at, to_reference_at, lse,
    key_buffers, slot_key_buffers, rotated_buffers, value_buffers, slot_value_buffers, query_buffers, write_buffers, bars,
    T, first_chunk, num_chunks, zero, scale,
    H: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr, EMPTY: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The subtiles of warp group GROUP, chunk by chunk."""
    m64: gl.constexpr = _accumulator(64)
    m32: gl.constexpr = _accumulator(32)
    m16: gl.constexpr = _accumulator(16)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=m64, k_width=2)
    halves: gl.constexpr = gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0])  # a thread holds four heads of a token
    by_head: gl.constexpr = gl.BlockedLayout([1, 4, 8], [4, 1, 8], [4, 1, 1], [2, 1, 0])
    # Rows of the window: 16 GROUP .. 16 GROUP + 79 of the 128, in three pieces that start at multiples of their sizes.
    A: gl.constexpr = 32 * ((GROUP + 1) // 2)
    B: gl.constexpr = A + 32
    E: gl.constexpr = 64 if GROUP == 0 else 16 if GROUP == 1 else 96 if GROUP == 2 else 48

    keys_full, rotated_full, values_full = bars.index(0), bars.index(1), bars.index(2)
    keys_free, rotated_free, values_free = bars.index(3), bars.index(4), bars.index(5)
    queries_full, writes_full = bars.index(6 + GROUP), bars.index(10 + GROUP)

    row = gl.arange(0, 64, layout=gl.SliceLayout(1, m64))
    token = row // R
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, m64))
    zeros = gl.zeros([64, 64], gl.float32, m64)
    logit_scale = scale * LOG2_E
    begin = gl.program_id(1)
    step = gl.num_programs(1)
    b, h = gl.program_id(0) // (H * PARTS), gl.program_id(0) // PARTS % H
    first_head = gl.program_id(0) % (H * PARTS) * R
    at_slots = gl.program_id(0) // PARTS * num_chunks
    phase = gl.to_tensor(0)
    for n in range(begin, num_chunks, step):
        # Where a buffer lies is formed in every turn, in uniform registers: kept over the loop it would take those that values need.
        here = n & zero
        key_buffer, slot_keys = key_buffers.index(here), slot_key_buffers.index(here)
        rotated_buffer = rotated_buffers.index(here)
        value_buffer, slot_values = value_buffers.index(here), slot_value_buffers.index(here)
        query_buffer, write = query_buffers.index(GROUP + here), write_buffers.index(GROUP + here)
        keys = key_buffer._reinterpret(gl.bfloat16, [64, 128], _swizzled(2))
        rotated_keys = rotated_buffer._reinterpret(gl.bfloat16, [128, 128], _swizzled(2))
        values = value_buffer._reinterpret(gl.bfloat16, [128, 128], _swizzled(2))
        queries = query_buffer._reinterpret(gl.bfloat16, [64, 128], _swizzled(2))
        later = n > begin
        more = n + step < num_chunks
        at_chunk = at_slots + n
        c0 = (first_chunk + n) * 64
        t0 = c0 + 16 * GROUP
        ahead = step * 64
        if GROUP == 1:
            mbarrier.wait(rotated_free, phase ^ 1, pred=later)
            _fill_rotated(rotated_desc, rotated_buffer, rotated_full, n, b, h, later)
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
        e = warpgroup_mma(scores, write, e * to_reference) * to_row
        if EMPTY == 1:  # nothing has been written before the window is full
            e = gl.where((t0 + token >= 64)[:, None], e, float("-inf"))
        largest = gl.max(e, 1) * logit_scale
        if EMPTY == 1:
            largest = gl.maximum(largest, -1e30)
        p = gl.exp2(e * logit_scale - largest[:, None])
        total = gl.sum(p, 1)
        p *= to_row
        weights = warpgroup_mma(gl.convert_layout(p.to(gl.bfloat16), operand), write.permute((1, 0)), zeros, use_acc=False)
        p = gl.convert_layout((p * to_reference).to(gl.bfloat16), operand)
        weights = gl.convert_layout(gl.where(pairs, weights, 0.0).to(gl.bfloat16), operand)
        _fill_writes(writes_desc, write, writes_full, at_chunk + step, more, GROUP)
        if GROUP == 2:
            mbarrier.wait(values_free, phase ^ 1, pred=later)
            _fill_values(v_desc, slots_desc, (value_buffer, slot_values), values_full, at_chunk, c0, b, h, later)

        # Rotated queries take the place of the raw ones.
        x1 = gl.convert_layout(gl.reshape(queries.slice(0, 64, dim=1).load(halves), [16, R, 64]), by_head).to(gl.float32)
        x2 = gl.convert_layout(gl.reshape(queries.slice(64, 64, dim=1).load(halves), [16, R, 64]), by_head).to(gl.float32)
        place = n * 64 + 16 * GROUP + gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(1, by_head)))
        at_angle = place[:, None] * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, by_head)))[None, :]
        c = gl.expand_dims(gl.load(cos + at_angle).to(gl.float32), 1)
        s = gl.expand_dims(gl.load(sin + at_angle).to(gl.float32), 1)
        sync()
        queries.slice(0, 64, dim=1).store(gl.reshape((x1 * c - x2 * s).to(gl.bfloat16), [64, 64]))
        queries.slice(64, 64, dim=1).store(gl.reshape((x2 * c + x1 * s).to(gl.bfloat16), [64, 64]))
        fence_async_shared()
        sync()
        if GROUP == 0:
            mbarrier.wait(keys_free, phase, pred=more)
            _fill_keys(k_desc, slots_desc, (key_buffer, slot_keys), keys_full, at_chunk + step, c0 + ahead, b, h, more)

        # Window.
        mbarrier.wait(rotated_full, phase)
        ea = _window_logits(queries, rotated_keys, c0, GROUP, A, 32, R)
        eb = _window_logits(queries, rotated_keys, c0, GROUP, B, 32, R)
        ec = _window_logits(queries, rotated_keys, c0, GROUP, E, 16, R)
        mbarrier.arrive(rotated_free, count=1)
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

        # Values, 64 channels at a time; the result takes the place of the queries.
        scale_out = (1 / total)[:, None]
        mbarrier.wait(values_full, phase)
        sync()
        for half in gl.static_range(2):
            of_values = values.slice(half * 64, 64, dim=1)
            acc = warpgroup_mma(p, slot_values.slice(half * 64, 64, dim=1), zeros, use_acc=False)
            acc = warpgroup_mma(weights, of_values.slice(0, 64, dim=0), acc) * rescale[:, None]
            acc = warpgroup_mma(ea, of_values.slice(A, 32, dim=0), acc)
            acc = warpgroup_mma(eb, of_values.slice(B, 32, dim=0), acc)
            acc = warpgroup_mma(ec, of_values.slice(E, 16, dim=0), acc)
            if half == 1:
                mbarrier.arrive(values_free, count=1)
            queries.slice(half * 64, 64, dim=1).store((acc * scale_out).to(gl.bfloat16))
        fence_async_shared()
        sync()
        tma.async_copy_shared_to_global(out_desc, [b, t0, first_head, 0], query_buffer)
        at_lse = lse + (b * T + t0).to(gl.int64) * (H * PARTS * R) + first_head
        gl.store(at_lse + token * (H * PARTS * R) + row % R, (new + gl.log2(total)) * LN_2, mask=t0 + token < T)
        tma.store_wait(0)
        _fill_queries(q_desc, query_buffer, queries_full, t0 + ahead, b, first_head, more)
        phase ^= 1


@gluon.jit(do_not_specialize=["first_chunk", "num_chunks", "zero"])
def attend_chunks(
    k_desc,  # [B, T, H*K] blocks of 64 tokens
    rotated_desc,  # [B, 64 + slab, H*K] blocks of 128
    v_desc,  # [B, T, H*V] blocks of 128
    slots_desc,  # [B*H*chunks*M, K+V] slots before each chunk, blocks [64, 128]
    writes_desc,  # [B*H*chunks*160, M]
    q_desc,  # [B, T, HQ, K] blocks of 16 tokens and 4 heads
    out_desc,  # [B, T, HQ, V] likewise
    cos,  # [slab, K/2]
    sin,
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
    key_buffers = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 64, 128], k_desc.layout)
    rotated_buffers = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 128, 128], rotated_desc.layout)
    value_buffers = gl.allocate_shared_memory(gl.bfloat16, [1, 1, 128, 128], v_desc.layout)
    slot_key_buffers = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 128], slots_desc.layout)
    slot_value_buffers = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 128], slots_desc.layout)
    query_buffers = gl.allocate_shared_memory(gl.bfloat16, [4, 1, 16, R, 128], q_desc.layout)
    write_buffers = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 64], writes_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [14, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(3 + i), count=4)
    for i in gl.static_range(8):
        mbarrier.init(bars.index(6 + i), count=1)
    fence_async_shared()
    sync()
    n = gl.program_id(1)
    b, h = gl.program_id(0) // (H * PARTS), gl.program_id(0) // PARTS % H
    first_head = gl.program_id(0) % (H * PARTS) * R
    at_chunk = gl.program_id(0) // PARTS * num_chunks + n
    c0 = (first_chunk + n) * 64
    there = n < num_chunks
    for i in gl.static_range(4):
        _fill_queries(q_desc, query_buffers.index(i), bars.index(6 + i), c0 + 16 * i, b, first_head, there)
    _fill_keys(k_desc, slots_desc, (key_buffers.index(0), slot_key_buffers.index(0)), bars.index(0), at_chunk, c0, b, h, there)
    for i in gl.static_range(4):
        _fill_writes(writes_desc, write_buffers.index(i), bars.index(10 + i), at_chunk, there, i)
    _fill_rotated(rotated_desc, rotated_buffers.index(0), bars.index(1), n, b, h, there)
    _fill_values(v_desc, slots_desc, (value_buffers.index(0), slot_value_buffers.index(0)), bars.index(2), at_chunk, c0, b, h, there)
    T, first_chunk, num_chunks, zero = gl.to_tensor(T), gl.to_tensor(first_chunk), gl.to_tensor(num_chunks), gl.to_tensor(zero)
    G0: gl.constexpr = 0
    G1: gl.constexpr = 1
    G2: gl.constexpr = 2
    G3: gl.constexpr = 3
    gl.warp_specialize(
        [
            (
                _attend_subtiles,
                (
                    k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc, cos, sin, to_row, to_reference, lse,
                    key_buffers, slot_key_buffers, rotated_buffers, value_buffers, slot_value_buffers, query_buffers, write_buffers, bars,
                    T, first_chunk, num_chunks, zero, scale, H, R, PARTS, EMPTY, G0,
                ),
            ),  # fmt: skip
            (
                _attend_subtiles,
                (
                    k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc, cos, sin, to_row, to_reference, lse,
                    key_buffers, slot_key_buffers, rotated_buffers, value_buffers, slot_value_buffers, query_buffers, write_buffers, bars,
                    T, first_chunk, num_chunks, zero, scale, H, R, PARTS, EMPTY, G1,
                ),
            ),  # fmt: skip
            (
                _attend_subtiles,
                (
                    k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc, cos, sin, to_row, to_reference, lse,
                    key_buffers, slot_key_buffers, rotated_buffers, value_buffers, slot_value_buffers, query_buffers, write_buffers, bars,
                    T, first_chunk, num_chunks, zero, scale, H, R, PARTS, EMPTY, G2,
                ),
            ),  # fmt: skip
            (
                _attend_subtiles,
                (
                    k_desc, rotated_desc, v_desc, slots_desc, writes_desc, q_desc, out_desc, cos, sin, to_row, to_reference, lse,
                    key_buffers, slot_key_buffers, rotated_buffers, value_buffers, slot_value_buffers, query_buffers, write_buffers, bars,
                    T, first_chunk, num_chunks, zero, scale, H, R, PARTS, EMPTY, G3,
                ),
            ),  # fmt: skip
        ],
        [4, 4, 4],
        [REGISTERS, REGISTERS, REGISTERS],
    )
