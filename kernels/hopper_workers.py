"""The Gluon kernel of `attend_hopper`: attention over lists of key tiles, by one worker per multiprocessor.

A worker takes one program (a tile of queries of one head) after the other: one of its warps, the producer, loads, and
three groups of four warps, the consumers, compute. Each consumer owns 64 query rows: while one of them is in its
softmax, the tensor cores work for the others. The producer streams K and V through a ring of two stages in shared
memory, across the ends of programs.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..ops import LOG2_E
from ..skip_state import TileShape
from .gluon_adapter import async_load, async_store

HOPPER_TILE = TileShape(192, 128)
_CONSUMERS = gl.constexpr(3)
CONSUMER_ROWS = 64
"""Query rows of one consumer: what a warpgroup multiplies at once. They share a scale where q has 8 bits."""
_ROWS, _TILE_K = gl.constexpr(CONSUMER_ROWS), gl.constexpr(HOPPER_TILE.k)
_STAGES = gl.constexpr(2)
_PLACES = gl.constexpr(15)
(
    _COUNT, _TURN, _ROUND, _BATCH, _HEAD, _START, _ROWS_LEFT, _ORDER, _NOTES, _RAISED, _LSE, _BIAS, _BIASED, _Q_SCALES,
    _K_SCALES,
) = (gl.constexpr(place) for place in range(_PLACES.value))  # fmt: skip
"""Where the producer writes down for the consumers what differs between programs: how many tiles this one visits (-1:
none is left), how many tiles and how many programs came before it, its batch entry, head and first query, and how many
queries there are from that on; then addresses."""
_LN_2, _LOG2_E = gl.constexpr(math.log(2)), gl.constexpr(LOG2_E)
_LOWEST = gl.constexpr(torch.finfo(torch.float32).min / LOG2_E)
"""Natural units: below it, float32 has no finite value in log2 units."""
_MAGIC, _MAGIC_BITS = gl.constexpr(1.5 * 2.0**23), gl.constexpr(0x4B400000)
"""A float32 whose last bit counts ones: adding an integer to its bits adds it to its value, which saves converting."""
_INFINITY_BITS = gl.constexpr(-0x800000)
"""Those of -inf in float32, as an integer."""


def _rescale_asm(count: int) -> str:
    """PTX that multiplies `count` registers by their factors, unless the factors of all threads of the warp are 1.

    A thread holds pieces of two rows, in pairs of registers by turns: the first and the third are of one row each.
    """
    first, third = 2 * count, 2 * count + 2
    lines = [
        "{", ".reg .pred p;", f"setp.neu.f32 p, ${first}, 0f3F800000;", f"setp.neu.or.f32 p, ${third}, 0f3F800000, p;",
        "vote.sync.any.pred p, p, 0xffffffff;", "@!p bra.uni AS_IT_IS;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        "AS_IT_IS:", "}",
    ]  # fmt: skip
    return "\n".join(lines)


def _rescale_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


_RESCALE_32, _RESCALE_64 = gl.constexpr(_rescale_asm(32)), gl.constexpr(_rescale_asm(64))
_CONSTRAINTS_32, _CONSTRAINTS_64 = gl.constexpr(_rescale_constraints(32)), gl.constexpr(_rescale_constraints(64))


@gluon.jit
def _read_queue(counts, queue, ticket):
    """`(program, count)`: the program of that place in the queue, and how many tiles it visits."""
    if queue is None:
        return ticket, gl.load(counts + ticket)
    else:
        entry = gl.load(queue + ticket)
        return (entry >> 32).to(gl.int32), entry.to(gl.int32)


@gluon.jit
def _take(counts, programs):
    """The next place in the queue, or one past its end."""
    return gl.num_programs(0) + gl.atomic_add(counts + programs, 1)


@gluon.jit
def _load_tile(descriptors, ring, turn, batch, kv_head, tile, QK_BITS: gl.constexpr):
    """Load a tile of K and V, the `turn`th of this multiprocessor, as soon as the consumers have freed its place."""
    _, k_desc, v_desc = descriptors
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = ring
    stage = turn % _STAGES
    phase = (turn // _STAGES) & 1
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    async_load(k_desc, [batch, kv_head, tile * _TILE_K, 0], k_full.index(stage), k_smem.index(stage))
    if QK_BITS == 16:
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    async_load(v_desc, [batch, kv_head, tile * _TILE_K, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _write(task, place: gl.constexpr, value):
    """For the consumers, by the producer's one warp; an mbarrier tells them."""
    task.index(place).store(gl.full([1], value.to(gl.int64), gl.int64, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _read(task, place: gl.constexpr):
    """int64: what the producer wrote there."""
    return gl.max(task.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _produce(
    descriptors, extras, queries, ring, lists, counts, queue, programs, sizes, heads_per_kv, bias_stride,
    QK_BITS: gl.constexpr,
):  # fmt: skip
    """Take one program after the other off the queue, and load its queries and the listed tiles of K and V.

    Of the next program it loads what it can while the consumers still compute this one, and writes down for them all
    that differs between programs: registers that held it would be missing in their loop.
    """
    q_desc = descriptors[0]
    q_smem, q_full, q_empty, task = queries
    orders, notes = lists
    heads, q_tiles, q_len, k_tiles = sizes
    lse, key_bias, biased, q_scales, k_scales = extras
    ticket = gl.program_id(0)
    turn = ticket * 0
    round = ticket * 0
    while ticket < programs:
        program, count = _read_queue(counts, queue, ticket)
        row = program // q_tiles
        batch, head = row // heads, row % heads
        kv_head = head // heads_per_kv
        q_start = program % q_tiles * (_CONSUMERS * _ROWS)
        order = orders + program.to(gl.int64) * k_tiles
        tile = gl.load(order, mask=count > 0, other=0).to(gl.int32)
        # The next program is taken as late as its loads allow: who takes it while this one is long makes it wait.
        if count <= 1:
            ticket = _take(counts, programs)
        ahead = gl.minimum(count, 1)
        for _ in range(ahead):  # a tile before the queries, whose place is freed last
            _load_tile(descriptors, ring, turn, batch, kv_head, tile, QK_BITS)
        for i in gl.static_range(_CONSUMERS):
            mbarrier.wait(q_empty.index(i), (round & 1) ^ 1)
        _write(task, _COUNT, count)
        _write(task, _TURN, turn)
        _write(task, _ROUND, round)
        _write(task, _BATCH, batch)
        _write(task, _HEAD, head)
        _write(task, _START, q_start)
        _write(task, _ROWS_LEFT, q_len - q_start)
        _write(task, _ORDER, order - turn)
        noted = notes + program.to(gl.int64) * (1 + 2 * k_tiles)
        _write(task, _NOTES, noted)
        _write(task, _RAISED, noted + 1 + k_tiles)
        if lse is not None:
            _write(task, _LSE, lse + row.to(gl.int64) * q_len + q_start)
        if key_bias is not None:
            _write(task, _BIAS, key_bias + batch.to(gl.int64) * bias_stride)
            _write(task, _BIASED, biased + batch * (bias_stride > 0).to(gl.int32) * k_tiles)
        if QK_BITS == 8:
            _write(task, _Q_SCALES, q_scales + row * ((q_len + _ROWS - 1) // _ROWS) + q_start // _ROWS)
            _write(task, _K_SCALES, k_scales + (batch * (heads // heads_per_kv) + kv_head) * k_tiles)
        for i in gl.static_range(_CONSUMERS):
            mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
            async_load(q_desc, [batch, head, q_start + i * _ROWS, 0], q_full.index(i), q_smem.index(i))
        tile = gl.load(order + 1, mask=count > 1, other=0).to(gl.int32)
        for n in range(ahead, count):
            now = tile
            tile = gl.load(order + n + 1, mask=n + 1 < count, other=0).to(gl.int32)
            _load_tile(descriptors, ring, turn + n, batch, kv_head, now, QK_BITS)
            if n + 1 == count:
                ticket = _take(counts, programs)
        turn += count
        round += 1
    for i in gl.static_range(_CONSUMERS):
        mbarrier.wait(q_empty.index(i), (round & 1) ^ 1)
    _write(task, _COUNT, ticket * 0 - 1)
    for i in gl.static_range(_CONSUMERS):
        mbarrier.arrive(q_full.index(i), count=1)


@gluon.jit
def _sum_own(x):
    """`[_ROWS, 4]`: sums over what each thread holds of a row of `x` `[_ROWS, _TILE_K]`, without any exchange."""
    return gl.sum(gl.sum(x.reshape([_ROWS, _TILE_K // 8, 4, 2]), 3), 1)


@gluon.jit
def _rescale(x, factor):
    """`x` `[_ROWS, 64 or 128]` times `factor` `[_ROWS]`, which is 1 while the maximum of a row stays."""
    factors = gl.zeros_like(x) + factor[:, None]
    if x.shape[1] == 128:
        return gl.inline_asm_elementwise(
            _RESCALE_64, _CONSTRAINTS_64, [x, factors], dtype=gl.float32, is_pure=True, pack=64
        )
    else:
        return gl.inline_asm_elementwise(
            _RESCALE_32, _CONSTRAINTS_32, [x, factors], dtype=gl.float32, is_pure=True, pack=32
        )


@gluon.jit
def _load_bias(pointers, inside):
    """Bias of a tile's keys in log2 units. What would overflow stays as it is, since the dense sum is finite there."""
    bias = gl.load(pointers, mask=inside, other=0.0)
    return gl.where(bias > _LOWEST, bias * _LOG2_E, bias)


@gluon.jit
def _consume(
    INDEX: gl.constexpr, o_desc, extras, queries, o_smem, turns, ring, lists, k_len, qk_scale, threshold,
    EVEN_K: gl.constexpr, HAS_LSE: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
):  # fmt: skip
    """Attention of `_ROWS` query rows from `INDEX * _ROWS` on, over the listed tiles, of one program after the other.

    With q and k in 8 bits the tensor cores are not what takes the time, and consumers that use them at will soon do so
    all at once, and then are in their softmax all at once. So they take turns: PV of a tile and QK^T of the next.
    """
    q_smem, q_full, q_empty, task = queries
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = ring
    orders, all_notes = lists  # of which, as of the next five, only the types are used
    lse, key_biases, all_biased, all_q_scales, all_k_scales = extras
    DIM: gl.constexpr = v_smem.shape[4]
    QK_DIM: gl.constexpr = q_smem.shape[4]
    IS_INT: gl.constexpr = q_smem.dtype == gl.int8
    AS_BITS: gl.constexpr = IS_INT and not HAS_BIAS
    TURNS: gl.constexpr = QK_BITS == 8
    FIRST: gl.constexpr = 1 if INDEX == 0 else 0  # its first turn is passed on by nobody
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE_K, 256 // QK_BITS])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    own_row = INDEX * _ROWS + gl.arange(0, _ROWS, ROW)
    everywhere = gl.zeros([_ROWS], gl.int32, ROW)
    no = gl.zeros([_ROWS], gl.int8, ROW)
    yes = gl.full([_ROWS], 1, gl.int8, ROW)
    zeros = gl.zeros([_ROWS, _TILE_K], gl.float32, S_LAYOUT)
    column = gl.arange(0, _TILE_K, gl.SliceLayout(0, S_LAYOUT))
    q_block = q_smem.index(INDEX).reshape([_ROWS, QK_DIM])
    o_block = o_smem.index(INDEX).reshape([_ROWS, DIM])
    my_turn, next_turn = turns.index(INDEX), turns.index((INDEX + 1) % _CONSUMERS)

    mbarrier.wait(q_full.index(INDEX), 0)
    count = _read(task, _COUNT).to(gl.int32)
    while count >= 0:
        first = _read(task, _TURN).to(gl.int32)
        order = _read(task, _ORDER).to(orders.dtype)
        marks = _read(task, _NOTES).to(all_notes.dtype) + 1
        live = own_row < _read(task, _ROWS_LEFT).to(gl.int32)
        running = gl.full([_ROWS], float("-inf"), gl.float32, ROW)
        argmax_tile = gl.zeros([_ROWS], gl.int32, ROW)
        total = _sum_own(zeros)
        OWN: gl.constexpr = gl.SliceLayout(1, total.type.layout)
        weighted = gl.zeros([_ROWS, DIM], gl.float32, O_LAYOUT)
        scale = qk_scale
        if QK_BITS == 8:
            k_scales = _read(task, _K_SCALES).to(all_k_scales.dtype)
            inside = _read(task, _ROWS_LEFT).to(gl.int32) > INDEX * _ROWS
            scale *= gl.load(_read(task, _Q_SCALES).to(all_q_scales.dtype) + INDEX, mask=inside, other=1.0)
        if HAS_BIAS:
            key_bias = _read(task, _BIAS).to(key_biases.dtype)
            biased = _read(task, _BIASED).to(all_biased.dtype)
        if TURNS:
            turns_before = _read(task, _ROUND).to(gl.int32)  # one turn more per program than tiles
            mbarrier.wait(my_turn, ((first + turns_before) & 1) ^ FIRST)
        for turn in range(first, first + count):
            stage = turn % _STAGES
            phase = (turn // _STAGES) & 1
            if not TURNS:
                tile = gl.load(order + turn).to(gl.int32)
            k_block = k_smem.index(stage).reshape([_TILE_K, QK_DIM]).permute((1, 0))
            factor = scale
            mbarrier.wait(k_full.index(stage), phase)
            if IS_INT:
                offset = gl.full([_ROWS, _TILE_K], _MAGIC_BITS, gl.int32, S_LAYOUT)
                product = warpgroup_mma(q_block, k_block, offset, is_async=True)
            else:
                product = warpgroup_mma(q_block, k_block, zeros, use_acc=False, is_async=True)
            if TURNS:
                mbarrier.arrive(next_turn, count=1)
                # While the product is computed: what waits for these before it leaves the tensor cores idle.
                tile = gl.load(order + turn).to(gl.int32)
                factor = scale * gl.load(k_scales + tile)
            scores = warpgroup_mma_wait(0, deps=[product])
            if IS_INT and not AS_BITS:
                scores = scores.to(gl.float32, bitcast=True) - _MAGIC
            if QK_BITS == 16:
                mbarrier.arrive(k_empty.index(stage), count=1)
            if HAS_BIAS:  # noqa: SIM102, decided when compiling
                if gl.load(biased + tile) != 0:
                    left = k_len - tile * _TILE_K
                    scores = scores * factor + _load_bias(key_bias + tile * _TILE_K + column, column < left)[None, :]
                    factor /= factor
            if not EVEN_K:  # noqa: SIM102, decided when compiling
                if k_len - tile * _TILE_K < _TILE_K:
                    hidden_score: gl.constexpr = _INFINITY_BITS if AS_BITS else float("-inf")
                    scores = gl.where((column < k_len - tile * _TILE_K)[None, :], scores, hidden_score)
            if AS_BITS:  # integers are in the order of the floats that their bits are: all positive, or -inf
                tile_max = (gl.max(scores, 1).to(gl.float32, bitcast=True) - _MAGIC) * factor
                scores = scores.to(gl.float32, bitcast=True)
            else:
                tile_max = gl.max(scores, 1) * factor
            # The difference is NaN while a row has met nothing but -inf.
            if BY_MASS:
                hidden = gl.where(tile_max - running == float("-inf"), 1.0, 0.0)
            else:
                negligible = tile_max - running <= threshold
            argmax_tile = gl.where(tile_max > running, tile, argmax_tile)
            raised = gl.maximum(running, tile_max)
            # A row that has met nothing but -inf has no maximum to subtract.
            shift = gl.where(raised == float("-inf"), 0.0, raised)
            decay = gl.exp2(running - shift)
            running = raised
            if AS_BITS:
                shift += factor * _MAGIC
            weights = gl.exp2(scores * factor - shift[:, None])
            if BY_MASS:
                mass = _sum_own(weights)
                total = total * gl.convert_layout(decay, OWN)[:, None] + mass
                # One exchange between the threads of a row, instead of one for each of the two sums.
                negligible = gl.convert_layout(gl.sum(mass - threshold * total, 1), ROW) < hidden
            else:
                total = total * gl.convert_layout(decay, OWN)[:, None] + _sum_own(weights)
            weighted = _rescale(weighted, gl.convert_layout(decay, O_ROW))
            weights = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
            mbarrier.wait(v_full.index(stage), phase)
            if TURNS:
                mbarrier.wait(my_turn, ((turn + turns_before + 1) & 1) ^ FIRST)
            v_block = v_smem.index(stage).reshape([_TILE_K, DIM])
            product = warpgroup_mma(weights, v_block, weighted, is_async=True)
            # Any row may clear the mark of a tile; that all of them would write the same spares a vote.
            gl.store(marks + tile + everywhere, no, mask=live & ~negligible)
            weighted = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(v_empty.index(stage) if QK_BITS == 16 else k_empty.index(stage), count=1)

        notes = _read(task, _NOTES).to(all_notes.dtype)
        batch, head = _read(task, _BATCH).to(gl.int32), _read(task, _HEAD).to(gl.int32)
        q_start = _read(task, _START).to(gl.int32)
        raised_at = _read(task, _RAISED).to(all_notes.dtype) + argmax_tile
        live = own_row < _read(task, _ROWS_LEFT).to(gl.int32)
        next_round = _read(task, _ROUND).to(gl.int32) + 1
        if HAS_LSE:
            lse_rows = _read(task, _LSE).to(lse.dtype) + own_row
        mbarrier.arrive(q_empty.index(INDEX), count=1)
        if TURNS:
            mbarrier.arrive(next_turn, count=1)
        sums = gl.convert_layout(gl.sum(total, 1), ROW)
        inverse = 1.0 / gl.where(sums == 0, 1.0, sums)
        weighted = weighted * gl.convert_layout(inverse, O_ROW)[:, None]
        tma.store_wait(0)  # of the program before
        o_block.store(weighted.to(o_smem.dtype))
        fence_async_shared()
        async_store(o_desc, [batch, head, q_start + INDEX * _ROWS, 0], o_smem.index(INDEX))
        if HAS_LSE:
            gl.store(lse_rows, (running + gl.log2(sums)) * _LN_2, mask=live)
        gl.store(notes + everywhere, yes, mask=live & (sums != sums))
        gl.store(raised_at, yes, mask=live)
        mbarrier.wait(q_full.index(INDEX), next_round & 1)
        count = _read(task, _COUNT).to(gl.int32)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["programs", "heads", "heads_per_kv", "q_len", "k_len", "q_tiles", "k_tiles", "bias_stride"],
    do_not_specialize_on_alignment=["lse", "key_bias", "threshold"],
)
def attend_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, key_bias, biased, q_scales, k_scales, order, notes, counts, queue,
    programs, heads, heads_per_kv, q_len, k_len, q_tiles, k_tiles, bias_stride, qk_scale, threshold,
    EVEN_K: gl.constexpr, HAS_LSE: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
):  # fmt: skip
    """Tiles of queries, one per program: `programs` in all, which as many workers as run at once take off a queue.

    Args:
        q_desc, k_desc, v_desc, o_desc: TMA descriptors of `[B, H, S, D]` for blocks of one consumer's rows (q, o) or of
            one key tile (k, v); what lies outside of the tensor reads as zeros and is not written.
        q_scales, k_scales: float32 `[B, H, ceil(Sq / _ROWS)]`, `[B, Hkv, k_tiles]` if q and k have 8 bits, else None.
        biased: as `flag_biased` wrote it; None without a bias.
        order, notes, counts: as `list_visits` wrote them.
        queue: as `queue_programs` wrote it; None: programs run in the order of their numbers.
        qk_scale: softmax scale * log2 e, positive, so that a row's maximum can be taken before scaling.
    """
    limit = gl.load(threshold)
    limit = gl.where(limit <= 0, limit, float("nan"))  # one that is positive marks nothing
    if BY_MASS:
        limit = gl.exp2(limit) / k_tiles

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [_CONSUMERS] + q_desc.block_shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [_STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [_STAGES] + v_desc.block_shape, v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [_CONSUMERS] + o_desc.block_shape, o_desc.layout)
    task = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [_CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [_CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [_CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=_CONSUMERS)
        mbarrier.init(v_empty.index(i), count=_CONSUMERS)
    fence_async_shared()

    queries = (q_smem, q_full, q_empty, task)
    ring = (k_smem, v_smem, k_full, v_full, k_empty, v_empty)
    lists = (order, notes)
    sizes = (heads, q_tiles, q_len, k_tiles)
    extras = (lse, key_bias, biased, q_scales, k_scales)
    gl.warp_specialize(
        [
            (
                _consume,
                (0, o_desc, extras, queries, o_smem, turns, ring, lists, k_len, qk_scale, limit,
                 EVEN_K, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS),
            ),
            (
                _consume,
                (1, o_desc, extras, queries, o_smem, turns, ring, lists, k_len, qk_scale, limit,
                 EVEN_K, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS),
            ),
            (
                _consume,
                (2, o_desc, extras, queries, o_smem, turns, ring, lists, k_len, qk_scale, limit,
                 EVEN_K, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS),
            ),
            (
                _produce,
                ((q_desc, k_desc, v_desc), extras, queries, ring, lists, counts, queue, programs, sizes, heads_per_kv,
                 bias_stride, QK_BITS),
            ),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip
