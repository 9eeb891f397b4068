"""Softmax with a shift that is fixed at the first tile that a task visits: the fast loop of the Hopper kernel.

Weights are 2 ** (score - shift), and float32 and bfloat16 have exponents to spare. So the shift is put `_ROOM` above
the first tile's maximum, and stays there: no exponential waits for a maximum, and what was summed up is never scaled.
If a score exceeds the shift after all, or all of a row's first scores are -inf, so that it has none, the task is done
again by the same loop, whose shift then is the running maximum, as in online softmax.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_pipeline import ROWS, TILE_K
from .hopper_products import multiply_keys, multiply_values, sum_own

_ROOM = gl.constexpr(48.0)
"""log2 units by which scores may exceed the first tile's. More would cost precision where V is small: weights and their
products with V share 126 exponents below 1."""
_ALL_BITS = gl.constexpr(0xFFFFFFFF)


def _smallest_asm() -> str:
    """PTX: the smallest of the 32 unsigned integers that a thread holds of each of two rows, in pairs by turns.

    sm_90 takes the smaller of three integers in one instruction, of floats only of two. Results are the first output
    and the third, the others are left undefined.
    """
    lines = ["{", ".reg .b32 other;"]
    for row in range(2):
        result, own = f"${2 * row}", [f"${64 + i}" for i in range(64) if i // 2 % 2 == row]
        for smallest, half in ((result, own[:16]), ("other", own[16:])):
            lines.append(f"min.u32 {smallest}, {half[0]}, {half[1]};")
            lines += [f"min.u32 {smallest}, {smallest}, {x};" for x in half[2:]]
        lines.append(f"min.u32 {result}, {result}, other;")
    return "\n".join([*lines, "}"])


_SMALLEST = gl.constexpr(_smallest_asm())
_SMALLEST_CONSTRAINTS = gl.constexpr(",".join(["=&r"] * 64 + ["r"] * 64))


@gluon.jit
def _highest(x, column):
    """`[ROWS]`: the largest number of each row of `x` `[ROWS, TILE_K]`, if all are negative; else another, or NaN.

    As unsigned integers the bits of negative numbers are larger than all others, and in reverse order.
    """
    bits = gl.inline_asm_elementwise(
        _SMALLEST, _SMALLEST_CONSTRAINTS, [x.to(gl.uint32, bitcast=True)], dtype=gl.uint32, is_pure=True, pack=64
    )
    defined = ((column < 8) & (column % 2 == 0))[None, :]
    return gl.min(gl.where(defined, bits, _ALL_BITS), 1).to(gl.float32, bitcast=True)


@gluon.jit
def visit_with_fixed_shift(
    q_block, ring, order, marks, live, again, zeros, weighted, first, count, k_len, scaling, threshold,
    EVEN_K: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
):  # fmt: skip
    """`(shift, argmax_tile, total, weighted, excess)`, the first four as `consume` describes them if `excess`, int32,
    is 0. Else the task has to be done again, and marks may have been cleared that should not be.

    `scaling`: what `begin_turns` has found. `again`: int32, 1 if the task is done again.
    """
    scale, k_scales, turns_of = scaling
    ROW: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    O_ROW: gl.constexpr = gl.SliceLayout(1, weighted.type.layout)

    everywhere = gl.zeros([ROWS], gl.int32, ROW)
    column = gl.arange(0, TILE_K, gl.SliceLayout(0, zeros.type.layout))
    shift = gl.zeros([ROWS], gl.float32, ROW)
    highest = gl.full([ROWS], float("-inf"), gl.float32, ROW)  # score less shift
    argmax_tile = gl.zeros([ROWS], gl.int32, ROW)
    total = sum_own(zeros)
    OWN: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    for turn in range(first, first + count):
        tile, scores, factor = multiply_keys(
            q_block, ring, order, turn, scale, k_scales, turns_of, zeros, QK_BITS, AS_BITS=False
        )
        if not EVEN_K:  # noqa: SIM102, decided when compiling
            if k_len - tile * TILE_K < TILE_K:
                scores = gl.where((column < k_len - tile * TILE_K)[None, :], scores, float("-inf"))
        if (again != 0) | (turn == first):
            raised = gl.max(scores, 1) * factor + gl.where(again != 0, 0.0, _ROOM)
            unset = highest == float("-inf")
            raised = gl.where(unset, raised, gl.maximum(shift, raised))
            lift = gl.where(unset, 0.0, raised - shift)
            decay = gl.exp2(-lift)
            total *= gl.convert_layout(decay, OWN)[:, None]
            weighted *= gl.convert_layout(decay, O_ROW)[:, None]
            # A row that has met nothing but -inf has no shift yet: its first attempt counts as one that exceeded it.
            unset = raised == float("-inf")
            highest = gl.where(unset & (again == 0), 0.0, highest - lift)
            shift = gl.where(unset, 0.0, raised)
        scores = scores * factor - shift[:, None]
        tile_max = _highest(scores, column)
        weights = gl.exp2(scores)
        mass = sum_own(weights)
        total += mass
        if BY_MASS:
            # The difference is NaN while a row has met nothing but -inf.
            hidden = gl.where(tile_max - highest == float("-inf"), 1.0, 0.0)
            negligible = gl.convert_layout(gl.sum(mass - threshold * total, 1), ROW) < hidden
        else:
            negligible = tile_max - highest <= threshold
        argmax_tile = gl.where(tile_max > highest, tile, argmax_tile)
        highest = gl.maximum(highest, tile_max)
        weighted = multiply_values(
            weights, weighted, ring, turn, turns_of, marks + tile + everywhere, live & ~negligible, QK_BITS
        )
    excess = gl.max(gl.where((highest < 0) | ~live, 0, 1), 0)
    return shift, argmax_tile, total, weighted, gl.where(again != 0, 0, excess)
