"""What the producer and the consumers of a Hopper kernel share: tiles, the ring in shared memory, and the task.

One warp of each program, the producer, loads; three groups of four warps, the consumers, compute (`hopper_consumers`).
The producer streams K and V through a ring of two stages, across the ends of tasks: a task is a tile of queries of one
head, with the key tiles that it visits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..skip_state import TileShape
from .gluon_adapter import async_load

HOPPER_TILE = TileShape(192, 128)
CONSUMERS = gl.constexpr(3)
CONSUMER_ROWS = 64
"""Query rows of one consumer: what a warpgroup multiplies at once. They share a scale where q has 8 bits."""
ROWS, TILE_K = gl.constexpr(CONSUMER_ROWS), gl.constexpr(HOPPER_TILE.k)
STAGES = gl.constexpr(2)
_PLACES = gl.constexpr(17)
(
    AT_COUNT, AT_TURN, AT_ROUND, AT_BATCH, AT_HEAD, AT_START, AT_ROWS_LEFT, AT_ORDER, AT_NOTES, AT_RAISED, AT_LSE,
    AT_BIAS, AT_BIASED, AT_Q_SCALES, AT_K_SCALES, AT_AGAIN, AT_EXCEEDED,
) = (gl.constexpr(place) for place in range(_PLACES.value))  # fmt: skip
"""Where the producer writes down for the consumers what differs between tasks: how many tiles this one visits (-1: none
is left), how many tiles and how many tasks came before it, its batch entry, head and first query, and how many queries
there are from that on; then addresses; then whether it is done again (`hopper_fixed_shift`). Registers that held it
would be missing in the consumers' loop. The last place is for the consumers: 1 if it is to be done again."""


@gluon.jit
def marking_limit(threshold, k_tiles, BY_MASS: gl.constexpr):
    """What a tile is compared with: log2 units or, by mass, a share of the sum of weights; NaN marks nothing."""
    limit = gl.load(threshold)
    limit = gl.where(limit <= 0, limit, float("nan"))
    if BY_MASS:
        limit = gl.exp2(limit) / k_tiles
    return limit


@gluon.jit
def allocate(q_desc, k_desc, v_desc, o_desc):
    """Shared memory: `(queries, ring, o_smem, turns)`."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS] + o_desc.block_shape, o_desc.layout)
    task = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return (q_smem, q_full, q_empty, task), (k_smem, v_smem, k_full, v_full, k_empty, v_empty), o_smem, turns


@gluon.jit
def write_task(task, place: gl.constexpr, value, WARPS: gl.constexpr = 1):
    """For the consumers, by the producer's one warp, or the other way round; an mbarrier tells them."""
    task.index(place).store(gl.full([1], value.to(gl.int64), gl.int64, gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def read_task(task, place: gl.constexpr, WARPS: gl.constexpr = 4):
    """int64: what was written there."""
    return gl.max(task.index(place).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def wait_for_consumers(queries, round):
    """Wait until the consumers need nothing any more of the queries of the task before the `round`th."""
    q_empty = queries[2]
    for i in gl.static_range(CONSUMERS):
        mbarrier.wait(q_empty.index(i), (round & 1) ^ 1)


@gluon.jit
def take_excess(task):
    """Whether a consumer has written down that the task it has finished is to be done again. It counts once."""
    exceeded = read_task(task, AT_EXCEEDED, 1) != 0
    write_task(task, AT_EXCEEDED, exceeded.to(gl.int64) * 0)
    return exceeded


@gluon.jit
def load_tile(descriptors, ring, turn, batch, kv_head, tile, QK_BITS: gl.constexpr):
    """Load a tile of K and V, the `turn`th of this multiprocessor, as soon as the consumers have freed its place."""
    _, k_desc, v_desc = descriptors
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = ring
    stage = turn % STAGES
    phase = (turn // STAGES) & 1
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    async_load(k_desc, [batch, kv_head, tile * TILE_K, 0], k_full.index(stage), k_smem.index(stage))
    if QK_BITS == 16:
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    async_load(v_desc, [batch, kv_head, tile * TILE_K, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def heads_of(program, heads, q_tiles, heads_per_kv):
    """`(batch entry, head, head of k and v)` of a program's tile of queries."""
    row = program // q_tiles
    head = row % heads
    return row // heads, head, head // heads_per_kv


@gluon.jit
def announce(
    q_desc, extras, queries, lists, sizes, place, program, count, turn, round, bias_stride, QK_BITS: gl.constexpr,
    again=None,
):  # fmt: skip
    """Tell the consumers of a task and load its queries, once the one before no longer needs the place.

    Returns whether that one is to be done again, if `again` is given, else False.

    Args:
        place: `heads_of(program)`, which is the number of the tile of queries.
        count, turn, round: how many tiles it visits; how many tiles and tasks this multiprocessor had before it.
        again: int32, 1 if it is to be done with a running maximum; None: the consumers do so anyway.
    """
    q_smem, q_full, _, task = queries
    orders, notes = lists
    heads, heads_per_kv, q_tiles, q_len, k_tiles = sizes
    lse, key_bias, biased, q_scales, k_scales = extras
    row = program // q_tiles
    batch, head, kv_head = place
    q_start = program % q_tiles * (CONSUMERS * ROWS)
    wait_for_consumers(queries, round)
    exceeded = False
    if again is not None:
        exceeded = take_excess(task)
        write_task(task, AT_AGAIN, again)
    write_task(task, AT_COUNT, count)
    write_task(task, AT_TURN, turn)
    write_task(task, AT_ROUND, round)
    write_task(task, AT_BATCH, batch)
    write_task(task, AT_HEAD, head)
    write_task(task, AT_START, q_start)
    write_task(task, AT_ROWS_LEFT, q_len - q_start)
    write_task(task, AT_ORDER, orders + program.to(gl.int64) * k_tiles - turn)
    noted = notes + program.to(gl.int64) * (1 + 2 * k_tiles)
    write_task(task, AT_NOTES, noted)
    write_task(task, AT_RAISED, noted + 1 + k_tiles)
    if lse is not None:
        write_task(task, AT_LSE, lse + row.to(gl.int64) * q_len + q_start)
    if key_bias is not None:
        write_task(task, AT_BIAS, key_bias + batch.to(gl.int64) * bias_stride)
        write_task(task, AT_BIASED, biased + batch * (bias_stride > 0).to(gl.int32) * k_tiles)
    if QK_BITS == 8:
        write_task(task, AT_Q_SCALES, q_scales + row * ((q_len + ROWS - 1) // ROWS) + q_start // ROWS)
        write_task(task, AT_K_SCALES, k_scales + (batch * (heads // heads_per_kv) + kv_head) * k_tiles)
    for i in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
        async_load(q_desc, [batch, head, q_start + i * ROWS, 0], q_full.index(i), q_smem.index(i))
    return exceeded


@gluon.jit
def announce_end(queries, round):
    """Tell the consumers that no task is left."""
    _, q_full, _, task = queries
    wait_for_consumers(queries, round)
    write_task(task, AT_COUNT, round * 0 - 1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.arrive(q_full.index(i), count=1)
