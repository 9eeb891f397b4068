"""Attention over lists of key tiles, by one persistent program per multiprocessor: the Gluon kernel of long rows.

A worker takes one task (a tile of queries of one head) after the other off a queue. Of the next one its producer loads
what it can while the consumers still compute this one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_adapter import thread_barrier
from .hopper_consumers import consume
from .hopper_pipeline import (
    allocate,
    announce,
    announce_end,
    heads_of,
    load_tile,
    marking_limit,
    take_excess,
    wait_for_consumers,
)


@gluon.jit
def _read_queue(queue, ticket):
    """`(program, count)`: the program of that place in the queue, and how many tiles it visits."""
    entry = gl.load(queue + ticket)
    return (entry >> 32).to(gl.int32), entry.to(gl.int32)


@gluon.jit
def _take(counts, programs):
    """The next place in the queue, or one past its end."""
    return gl.num_programs(0) + gl.atomic_add(counts + programs, 1)


@gluon.jit
def _mark_again(order, marks, count):
    """Set the marks of the listed tiles, as they were before the task.

    A consumer that has not exceeded its shift may clear marks after that: but for rounding, those it clears once more.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for start in range(0, count, 32):
        tile = gl.load(order + start + lane, mask=start + lane < count, other=0).to(gl.int32)
        gl.store(marks + tile, (lane * 0 + 1).to(gl.int8), mask=start + lane < count)
    thread_barrier()


@gluon.jit
def _produce(
    descriptors, extras, queries, ring, lists, counts, queue, programs, sizes, bias_stride, QK_BITS: gl.constexpr,
    FIXED_SHIFT: gl.constexpr,
):  # fmt: skip
    """Take one program after the other off the queue, and load its queries and the listed tiles of K and V.

    With a fixed shift the consumers may find, when a program is done, that it has to be done again: then it comes
    after the next one, or at once if there is none.
    """
    orders, notes = lists
    heads, heads_per_kv, q_tiles, _q_len, k_tiles = sizes
    ticket = gl.program_id(0)
    turn = ticket * 0
    round = ticket * 0
    before = ticket * 0 - 1
    repeated = ticket * 0 - 1
    while (ticket < programs) | (repeated >= 0):
        again = (repeated >= 0).to(gl.int32)
        program, count = _read_queue(queue, gl.minimum(ticket, programs - 1))
        if FIXED_SHIFT:  # noqa: SIM102, decided when compiling
            if again > 0:
                program = repeated
                count = gl.load(counts + program)
                _mark_again(
                    orders + program.to(gl.int64) * k_tiles, notes + program.to(gl.int64) * (1 + 2 * k_tiles) + 1, count
                )
        batch, head, kv_head = heads_of(program, heads, q_tiles, heads_per_kv)
        order = orders + program.to(gl.int64) * k_tiles
        tile = gl.load(order, mask=count > 0, other=0).to(gl.int32)
        # The next program is taken as late as its loads allow: who takes it while this one is long makes it wait.
        if (count <= 1) & (again == 0):
            ticket = _take(counts, programs)
        ahead = gl.minimum(count, 1)
        for _ in range(ahead):  # a tile before the queries, whose place is freed last
            load_tile(descriptors, ring, turn, batch, kv_head, tile, QK_BITS)
        place = batch, head, kv_head
        exceeded = announce(
            descriptors[0], extras, queries, lists, sizes, place, program, count, turn, round, bias_stride, QK_BITS,
            again if FIXED_SHIFT else None,
        )  # fmt: skip
        if FIXED_SHIFT:
            repeated = gl.where(exceeded, before, -1)
            before = program
        tile = gl.load(order + 1, mask=count > 1, other=0).to(gl.int32)
        for n in range(ahead, count):
            now = tile
            tile = gl.load(order + n + 1, mask=n + 1 < count, other=0).to(gl.int32)
            load_tile(descriptors, ring, turn + n, batch, kv_head, now, QK_BITS)
            if (n + 1 == count) & (again == 0):
                ticket = _take(counts, programs)
        turn += count
        round += 1
        if FIXED_SHIFT:  # noqa: SIM102, decided when compiling
            if (ticket >= programs) & (repeated < 0):
                wait_for_consumers(queries, round)
                repeated = gl.where(take_excess(queries[3]), program, -1)
    announce_end(queries, round)


@gluon.jit(
    do_not_specialize=["programs", "heads", "heads_per_kv", "q_len", "k_len", "q_tiles", "k_tiles", "bias_stride"],
    do_not_specialize_on_alignment=["lse", "key_bias", "threshold"],
)
def attend_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, key_bias, biased, q_scales, k_scales, order, notes, counts, queue,
    programs, heads, heads_per_kv, q_len, k_len, q_tiles, k_tiles, bias_stride, qk_scale, threshold,
    EVEN_K: gl.constexpr, HAS_LSE: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
    FIXED_SHIFT: gl.constexpr,
):  # fmt: skip
    """Tiles of queries, one per program: `programs` in all, which as many workers as run at once take off a queue.

    Args:
        q_desc, k_desc, v_desc, o_desc: TMA descriptors of `[B, H, S, D]` for blocks of one consumer's rows (q, o) or of
            one key tile (k, v); what lies outside of the tensor reads as zeros and is not written.
        q_scales, k_scales: float32 `[B, H, ceil(Sq / ROWS)]`, `[B, Hkv, k_tiles]` if q and k have 8 bits, else None.
        biased: as `flag_biased` wrote it; None without a bias.
        order, notes, counts: as `list_visits` wrote them.
        queue: as `queue_programs` wrote it.
        FIXED_SHIFT: whether to use `hopper_fixed_shift`: only where V is bfloat16 and there is no bias.
        qk_scale: softmax scale * log2 e, positive, so that a row's maximum can be taken before scaling.
    """
    limit = marking_limit(threshold, k_tiles, BY_MASS)
    queries, ring, o_smem, turns = allocate(q_desc, k_desc, v_desc, o_desc)
    lists = (order, notes)
    sizes = (heads, heads_per_kv, q_tiles, q_len, k_tiles)
    extras = (lse, key_bias, biased, q_scales, k_scales)
    gl.warp_specialize(
        [
            (
                consume,
                (0, o_desc, extras, queries, o_smem, turns, None, ring, lists, k_len, qk_scale, limit,
                 EVEN_K, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS, FIXED_SHIFT),
            ),
            (
                consume,
                (1, o_desc, extras, queries, o_smem, turns, None, ring, lists, k_len, qk_scale, limit,
                 EVEN_K, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS, FIXED_SHIFT),
            ),
            (
                consume,
                (2, o_desc, extras, queries, o_smem, turns, None, ring, lists, k_len, qk_scale, limit,
                 EVEN_K, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS, FIXED_SHIFT),
            ),
            (
                _produce,
                ((q_desc, k_desc, v_desc), extras, queries, ring, lists, counts, queue, programs, sizes, bias_stride,
                 QK_BITS, FIXED_SHIFT),
            ),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip
