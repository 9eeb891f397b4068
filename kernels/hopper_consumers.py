"""The consumers of the Hopper kernels: softmax(Q K^T) V of 64 query rows over the tiles that a task visits.

Each of the three is a warpgroup: while one of them is in its softmax, the tensor cores work for the others.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gluon_adapter import async_store, thread_barrier
from .hopper_fixed_shift import visit_with_fixed_shift
from .hopper_online_softmax import visit_online
from .hopper_pipeline import (
    AT_AGAIN,
    AT_BATCH,
    AT_COUNT,
    AT_EXCEEDED,
    AT_HEAD,
    AT_LSE,
    AT_NOTES,
    AT_ORDER,
    AT_RAISED,
    AT_ROUND,
    AT_ROWS_LEFT,
    AT_START,
    AT_TURN,
    CONSUMERS,
    ROWS,
    TILE_K,
    read_task,
    write_task,
)
from .hopper_products import begin_turns

_LN_2 = gl.constexpr(math.log(2))


@gluon.jit
def consume(
    INDEX: gl.constexpr, o_desc, extras, queries, o_smem, turns, done, ring, lists, k_len, qk_scale, threshold,
    EVEN_K: gl.constexpr, HAS_LSE: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
    FIXED_SHIFT: gl.constexpr,
):  # fmt: skip
    """Attention of `ROWS` query rows from `INDEX * ROWS` on, over the listed tiles, of one program after the other.

    A loop over tiles sums up `weighted` `[ROWS, DIM]`, V times weights 2 ** (score - `shift`) `[ROWS]`, and `total`, as
    `sum_own` has it, the weights; `argmax_tile` is where a row's largest score was. It clears the marks of tiles that
    matter.

    `done`: two mbarriers of which by turns one is to be told when a program's notes are complete, or None.

    Kernels write the arguments of all three consumers out: Gluon forgets what is constant in a sum of tuples.
    """
    q_smem, q_full, q_empty, task = queries
    v_smem = ring[1]
    orders, all_notes = lists  # of which, as of `tables`, only the types are used
    lse = extras[0]
    tables = extras[1], extras[2], extras[3], extras[4]
    DIM: gl.constexpr = v_smem.shape[4]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 256 // QK_BITS])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    own_row = INDEX * ROWS + gl.arange(0, ROWS, ROW)
    everywhere = gl.zeros([ROWS], gl.int32, ROW)
    yes = gl.full([ROWS], 1, gl.int8, ROW)
    zeros = gl.zeros([ROWS, TILE_K], gl.float32, S_LAYOUT)
    q_block = q_smem.index(INDEX).reshape([ROWS, q_smem.shape[4]])
    o_block = o_smem.index(INDEX).reshape([ROWS, DIM])

    mbarrier.wait(q_full.index(INDEX), 0)
    count = read_task(task, AT_COUNT).to(gl.int32)
    while count >= 0:
        first = read_task(task, AT_TURN).to(gl.int32)
        order = read_task(task, AT_ORDER).to(orders.dtype)
        marks = read_task(task, AT_NOTES).to(all_notes.dtype) + 1
        live = own_row < read_task(task, AT_ROWS_LEFT).to(gl.int32)
        nothing = gl.zeros([ROWS, DIM], gl.float32, O_LAYOUT)
        scaling = qk_scale, None, None
        if QK_BITS == 8:
            scaling = begin_turns(INDEX, turns, task, first, qk_scale, tables[2], tables[3])
        if FIXED_SHIFT:
            again = read_task(task, AT_AGAIN).to(gl.int32)
            shift, argmax_tile, total, weighted, excess = visit_with_fixed_shift(
                q_block, ring, order, marks, live, again, zeros, nothing, first, count, k_len, scaling, threshold,
                EVEN_K, QK_BITS, BY_MASS,
            )  # fmt: skip
        else:
            shift, argmax_tile, total, weighted = visit_online(
                q_block, ring, task, order, marks, live, tables, zeros, nothing, first, count, k_len, scaling,
                threshold, EVEN_K, HAS_BIAS, QK_BITS, BY_MASS,
            )  # fmt: skip

        notes = read_task(task, AT_NOTES).to(all_notes.dtype)
        batch, head = read_task(task, AT_BATCH).to(gl.int32), read_task(task, AT_HEAD).to(gl.int32)
        q_start = read_task(task, AT_START).to(gl.int32)
        raised_at = read_task(task, AT_RAISED).to(all_notes.dtype) + argmax_tile
        live = own_row < read_task(task, AT_ROWS_LEFT).to(gl.int32)
        next_round = read_task(task, AT_ROUND).to(gl.int32) + 1
        if HAS_LSE:
            lse_rows = read_task(task, AT_LSE).to(lse.dtype) + own_row
        if FIXED_SHIFT:
            live = live & (excess == 0)
            if excess > 0:
                write_task(task, AT_EXCEEDED, excess, 4)
                thread_barrier()  # what its threads have marked is to be there before the producer marks again
        mbarrier.arrive(q_empty.index(INDEX), count=1)
        if QK_BITS == 8:
            mbarrier.arrive(turns.index((INDEX + 1) % CONSUMERS), count=1)
        sums = gl.convert_layout(gl.sum(total, 1), ROW)
        inverse = 1.0 / gl.where(sums == 0, 1.0, sums)
        weighted = weighted * gl.convert_layout(inverse, O_ROW)[:, None]
        tma.store_wait(0)  # of the program before
        o_block.store(weighted.to(o_smem.dtype))
        fence_async_shared()
        if not FIXED_SHIFT or excess == 0:
            async_store(o_desc, [batch, head, q_start + INDEX * ROWS, 0], o_smem.index(INDEX))
        if HAS_LSE:
            gl.store(lse_rows, (shift + gl.log2(sums)) * _LN_2, mask=live)
        gl.store(notes + everywhere, yes, mask=live & (sums != sums))
        gl.store(raised_at, yes, mask=live)
        if done is not None:
            thread_barrier()  # what all threads have noted
            mbarrier.arrive(done.index((next_round - 1) & 1), count=1)
        mbarrier.wait(q_full.index(INDEX), next_round & 1)
        count = read_task(task, AT_COUNT).to(gl.int32)
    tma.store_wait(0)
