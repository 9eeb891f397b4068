"""What both loops over key tiles of the Hopper kernels do: the two products of a tile, and sums of its weights.

With q and k in 8 bits the tensor cores are not what takes the time, and consumers that use them at will soon do so all
at once, and then are in their softmax all at once. So they take turns: PV of a tile and QK^T of the next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .hopper_pipeline import (
    AT_K_SCALES,
    AT_Q_SCALES,
    AT_ROUND,
    AT_ROWS_LEFT,
    CONSUMERS,
    ROWS,
    STAGES,
    TILE_K,
    read_task,
)

MAGIC = gl.constexpr(1.5 * 2.0**23)
_MAGIC_BITS = gl.constexpr(0x4B400000)
"""A float32 and its bits, of which the last counts ones: adding an integer to the bits adds it to the value."""


@gluon.jit
def begin_turns(INDEX: gl.constexpr, turns, task, first, scale, q_scales, k_scales):
    """`(scale, k_scales, turns_of)` of a task in 8 bits whose first tile is the `first` of this multiprocessor.

    The scale of its scores but for that of the key tile; where those of key tiles are; and the mbarriers of this
    consumer's turns and of the next one's, with what to add to a tile's number for its turn's parity. Of `q_scales` and
    `k_scales` only the types are used.
    """
    FIRST: gl.constexpr = 1 if INDEX == 0 else 0  # its first turn is passed on by nobody
    inside = read_task(task, AT_ROWS_LEFT).to(gl.int32) > INDEX * ROWS
    scale *= gl.load(read_task(task, AT_Q_SCALES).to(q_scales.dtype) + INDEX, mask=inside, other=1.0)
    parity = read_task(task, AT_ROUND).to(gl.int32) ^ FIRST  # one turn more per program than tiles
    mbarrier.wait(turns.index(INDEX), (first + parity) & 1)
    turns_of = turns.index(INDEX), turns.index((INDEX + 1) % CONSUMERS), parity
    return scale, read_task(task, AT_K_SCALES).to(k_scales.dtype), turns_of


@gluon.jit
def multiply_keys(
    q_block, ring, order, turn, scale, k_scales, turns_of, zeros, QK_BITS: gl.constexpr, AS_BITS: gl.constexpr
):  # fmt: skip
    """`(tile, scores, factor)` of the key tile of that turn: scores times factor are in log2 units.

    Scores are float32, or, if `AS_BITS`, int32: the bits of `MAGIC` plus the score, which is of int8. That saves
    converting them, but accumulators have to be set to `MAGIC` during the consumer's turn, when no other may use the
    tensor cores. With 16 bits `k_scales` and `turns_of` are None.
    """
    IS_INT: gl.constexpr = ring[0].dtype == gl.int8
    k_smem, _, k_full, _, k_empty, _ = ring
    stage = turn % STAGES
    phase = (turn // STAGES) & 1
    if QK_BITS == 16:
        tile = gl.load(order + turn).to(gl.int32)
    k_block = k_smem.index(stage).reshape([TILE_K, k_smem.shape[4]]).permute((1, 0))
    factor = scale
    mbarrier.wait(k_full.index(stage), phase)
    if AS_BITS:
        offset = gl.full([ROWS, TILE_K], _MAGIC_BITS, gl.int32, zeros.type.layout)
        product = warpgroup_mma(q_block, k_block, offset, is_async=True)
    else:
        nothing = zeros.to(gl.int32) if IS_INT else zeros
        product = warpgroup_mma(q_block, k_block, nothing, use_acc=False, is_async=True)
    if QK_BITS == 8:
        mbarrier.arrive(turns_of[1], count=1)
        # While the product is computed: what waits for these before it leaves the tensor cores idle.
        tile = gl.load(order + turn).to(gl.int32)
        factor = scale * gl.load(k_scales + tile)
    scores = warpgroup_mma_wait(0, deps=[product])
    if QK_BITS == 16:
        mbarrier.arrive(k_empty.index(stage), count=1)
    if IS_INT and not AS_BITS:
        scores = scores.to(gl.float32)
    return tile, scores, factor


@gluon.jit
def sum_own(x):
    """`[ROWS, 4]`: sums over what each thread holds of a row of `x` `[ROWS, TILE_K]`, without any exchange."""
    return gl.sum(gl.sum(x.reshape([ROWS, TILE_K // 8, 4, 2]), 3), 1)


@gluon.jit
def multiply_values(weights, weighted, ring, turn, turns_of, marks_at, matters, QK_BITS: gl.constexpr):
    """`weighted` `[ROWS, DIM]` plus `weights` `[ROWS, TILE_K]` times V; clears the mark of a tile that matters.

    `marks_at`, `matters`: `[ROWS]`, where the mark is, and whether the row needs the tile. Any row may clear it; that
    all of them would write the same spares a vote.
    """
    _, v_smem, _, v_full, k_empty, v_empty = ring
    ROW: gl.constexpr = matters.type.layout
    stage = turn % STAGES
    phase = (turn // STAGES) & 1
    weights = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, weighted.type.layout, 2))
    mbarrier.wait(v_full.index(stage), phase)
    if QK_BITS == 8:
        mbarrier.wait(turns_of[0], (turn + 1 + turns_of[2]) & 1)
    v_block = v_smem.index(stage).reshape([TILE_K, v_smem.shape[4]])
    product = warpgroup_mma(weights, v_block, weighted, is_async=True)
    gl.store(marks_at, gl.zeros([ROWS], gl.int8, ROW), mask=matters)
    weighted = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(v_empty.index(stage) if QK_BITS == 16 else k_empty.index(stage), count=1)
    return weighted
