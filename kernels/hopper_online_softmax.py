"""Softmax with a running maximum (online softmax) over the tiles that a task visits: the loop for all inputs.

What was summed up is scaled down whenever the maximum of a row rises.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..ops import LOG2_E
from .hopper_pipeline import (
    AT_BIAS,
    AT_BIASED,
    AT_K_SCALES,
    AT_Q_SCALES,
    AT_ROUND,
    AT_ROWS_LEFT,
    CONSUMERS,
    ROWS,
    STAGES,
    TILE_K,
    read_task,
    sum_own,
)

_LOG2_E = gl.constexpr(LOG2_E)
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
def _rescale(x, factor):
    """`x` `[ROWS, 64 or 128]` times `factor` `[ROWS]`, which is 1 while the maximum of a row stays."""
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
def visit_online(
    INDEX: gl.constexpr, q_block, ring, turns, task, order, marks, live, tables, zeros, weighted, first, count, k_len,
    qk_scale, threshold, EVEN_K: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
):  # fmt: skip
    """`(shift, argmax_tile, total, weighted)` as `consume` describes them; the shift is the maximum.

    With q and k in 8 bits the tensor cores are not what takes the time, and consumers that use them at will soon do so
    all at once, and then are in their softmax all at once. So they take turns: PV of a tile and QK^T of the next.
    """
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = ring
    key_biases, all_biased, all_q_scales, all_k_scales = tables  # of which only the types are used
    DIM: gl.constexpr = v_smem.shape[4]
    QK_DIM: gl.constexpr = k_smem.shape[4]
    IS_INT: gl.constexpr = k_smem.dtype == gl.int8
    AS_BITS: gl.constexpr = IS_INT and not HAS_BIAS
    TURNS: gl.constexpr = QK_BITS == 8
    FIRST: gl.constexpr = 1 if INDEX == 0 else 0  # its first turn is passed on by nobody
    S_LAYOUT: gl.constexpr = zeros.type.layout
    O_LAYOUT: gl.constexpr = weighted.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)

    everywhere = gl.zeros([ROWS], gl.int32, ROW)
    no = gl.zeros([ROWS], gl.int8, ROW)
    column = gl.arange(0, TILE_K, gl.SliceLayout(0, S_LAYOUT))
    my_turn, next_turn = turns.index(INDEX), turns.index((INDEX + 1) % CONSUMERS)
    running = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    argmax_tile = gl.zeros([ROWS], gl.int32, ROW)
    total = sum_own(zeros)
    OWN: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    scale = qk_scale
    if QK_BITS == 8:
        k_scales = read_task(task, AT_K_SCALES).to(all_k_scales.dtype)
        inside = read_task(task, AT_ROWS_LEFT).to(gl.int32) > INDEX * ROWS
        scale *= gl.load(read_task(task, AT_Q_SCALES).to(all_q_scales.dtype) + INDEX, mask=inside, other=1.0)
    if HAS_BIAS:
        key_bias = read_task(task, AT_BIAS).to(key_biases.dtype)
        biased = read_task(task, AT_BIASED).to(all_biased.dtype)
    if TURNS:
        turns_before = read_task(task, AT_ROUND).to(gl.int32)  # one turn more per program than tiles
        mbarrier.wait(my_turn, ((first + turns_before) & 1) ^ FIRST)
    for turn in range(first, first + count):
        stage = turn % STAGES
        phase = (turn // STAGES) & 1
        if not TURNS:
            tile = gl.load(order + turn).to(gl.int32)
        k_block = k_smem.index(stage).reshape([TILE_K, QK_DIM]).permute((1, 0))
        factor = scale
        mbarrier.wait(k_full.index(stage), phase)
        if IS_INT:
            offset = gl.full([ROWS, TILE_K], _MAGIC_BITS, gl.int32, S_LAYOUT)
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
                left = k_len - tile * TILE_K
                scores = scores * factor + _load_bias(key_bias + tile * TILE_K + column, column < left)[None, :]
                factor /= factor
        if not EVEN_K:  # noqa: SIM102, decided when compiling
            if k_len - tile * TILE_K < TILE_K:
                hidden_score: gl.constexpr = _INFINITY_BITS if AS_BITS else float("-inf")
                scores = gl.where((column < k_len - tile * TILE_K)[None, :], scores, hidden_score)
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
            mass = sum_own(weights)
            total = total * gl.convert_layout(decay, OWN)[:, None] + mass
            # One exchange between the threads of a row, instead of one for each of the two sums.
            negligible = gl.convert_layout(gl.sum(mass - threshold * total, 1), ROW) < hidden
        else:
            total = total * gl.convert_layout(decay, OWN)[:, None] + sum_own(weights)
        weighted = _rescale(weighted, gl.convert_layout(decay, O_ROW))
        weights = gl.convert_layout(weights.to(v_smem.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
        mbarrier.wait(v_full.index(stage), phase)
        if TURNS:
            mbarrier.wait(my_turn, ((turn + turns_before + 1) & 1) ^ FIRST)
        v_block = v_smem.index(stage).reshape([TILE_K, DIM])
        product = warpgroup_mma(weights, v_block, weighted, is_async=True)
        # Any row may clear the mark of a tile; that all of them would write the same spares a vote.
        gl.store(marks + tile + everywhere, no, mask=live & ~negligible)
        weighted = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(v_empty.index(stage) if QK_BITS == 16 else k_empty.index(stage), count=1)
    return running, argmax_tile, total, weighted
