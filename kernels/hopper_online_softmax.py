"""Softmax with a running maximum (online softmax) over the tiles that a task visits: the loop for all inputs.

What was summed up is scaled down whenever the maximum of a row rises.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..ops import LOG2_E
from .hopper_pipeline import AT_BIAS, AT_BIASED, ROWS, TILE_K, read_task
from .hopper_products import MAGIC, multiply_keys, multiply_values, sum_own

_LOG2_E = gl.constexpr(LOG2_E)
_LOWEST = gl.constexpr(torch.finfo(torch.float32).min / LOG2_E)
"""Natural units: below it, float32 has no finite value in log2 units."""
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
    q_block, ring, task, order, marks, live, tables, zeros, weighted, first, count, k_len, scaling, threshold,
    EVEN_K: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
):  # fmt: skip
    """`(shift, argmax_tile, total, weighted)` as `consume` describes them; the shift is the maximum.

    `scaling`: what `begin_turns` has found.
    """
    scale, k_scales, turns_of = scaling
    key_biases, all_biased, _, _ = tables  # of which only the types are used
    AS_BITS: gl.constexpr = ring[0].dtype == gl.int8 and not HAS_BIAS  # a bias is added to scores, not to bits
    ROW: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    O_ROW: gl.constexpr = gl.SliceLayout(1, weighted.type.layout)

    everywhere = gl.zeros([ROWS], gl.int32, ROW)
    column = gl.arange(0, TILE_K, gl.SliceLayout(0, zeros.type.layout))
    running = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    argmax_tile = gl.zeros([ROWS], gl.int32, ROW)
    total = sum_own(zeros)
    OWN: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    if HAS_BIAS:
        key_bias = read_task(task, AT_BIAS).to(key_biases.dtype)
        biased = read_task(task, AT_BIASED).to(all_biased.dtype)
    for turn in range(first, first + count):
        tile, scores, factor = multiply_keys(
            q_block, ring, order, turn, scale, k_scales, turns_of, zeros, QK_BITS, AS_BITS
        )
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
            tile_max = (gl.max(scores, 1).to(gl.float32, bitcast=True) - MAGIC) * factor
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
            shift += factor * MAGIC
        weights = gl.exp2(scores * factor - shift[:, None])
        if BY_MASS:
            mass = sum_own(weights)
            total = total * gl.convert_layout(decay, OWN)[:, None] + mass
            # One exchange between the threads of a row, instead of one for each of the two sums.
            negligible = gl.convert_layout(gl.sum(mass - threshold * total, 1), ROW) < hidden
        else:
            total = total * gl.convert_layout(decay, OWN)[:, None] + sum_own(weights)
        weighted = _rescale(weighted, gl.convert_layout(decay, O_ROW))
        weighted = multiply_values(
            weights, weighted, ring, turn, turns_of, marks + tile + everywhere, live & ~negligible, QK_BITS
        )
    return running, argmax_tile, total, weighted
