"""Gated residual, layer norm and modulation in one pass over memory.

The ops `lite_compile::add_normalize` and `lite_compile::normalize` say what it computes (`layer_norm_op.py`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

MAX_ELEMENTS = 1 << 14
"""Most channels of a token, padded to a power of two: they stay in registers from the sum to the result."""
_ELEMENTS_PER_WARP = 1024


@triton.jit
def add_normalize_kernel(
    x, y, gate, weight, bias, scale, shift, total, normed, tokens, eps, gate_batch, scale_batch, shift_batch,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """One token per program.

    Args:
        x, y, total, normed: `[B, tokens, DIM]`, dense; `y` and `total` only with `ADDS`.
        gate, scale, shift: `[DIM]` per batch entry, so many elements apart.
        weight, bias: `[DIM]`, dense.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // tokens
    dim = tl.arange(0, BLOCK)
    inside = dim < DIM
    row = program * DIM + dim
    value = tl.load(x + row, mask=inside, other=0).to(tl.float32)
    if ADDS:
        added = tl.load(y + row, mask=inside, other=0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + batch * gate_batch + dim, mask=inside, other=0).to(tl.float32)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + row, rounded, mask=inside)
        value = rounded.to(tl.float32)  # what the norm would have read
    centred = tl.where(inside, value - tl.sum(value, axis=0) / DIM, 0)
    value = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / DIM + eps)
    if HAS_WEIGHT:
        value *= tl.load(weight + dim, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + dim, mask=inside, other=0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale + batch * scale_batch + dim, mask=inside, other=0).to(tl.float32)
    if HAS_SHIFT:
        value += tl.load(shift + batch * shift_batch + dim, mask=inside, other=0).to(tl.float32)
    tl.store(normed + row, value.to(normed.dtype.element_ty), mask=inside)


def is_supported(dim: int) -> bool:
    """Whether a token of so many channels fits into registers."""
    return bool(triton.next_power_of_2(dim) <= MAX_ELEMENTS)


def plan_launch(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, eps: float, total: Tensor | None, normed: Tensor,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Grid, arguments, and constants of the launch that fills `normed` and, with `y`, `total`: `[B, S, C]` like `x`."""
    batch, tokens, dim = x.shape[0], x.shape[1], int(x.shape[2])
    block = triton.next_power_of_2(dim)
    arguments = (
        x, y, gate, weight, bias, scale, shift, total, normed, tokens, eps, *map(_per_batch, (gate, scale, shift)),
    )  # fmt: skip
    constants = {
        "DIM": dim, "BLOCK": block, "ADDS": y is not None, "HAS_GATE": gate is not None,
        "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None, "num_warps": min(max(block // _ELEMENTS_PER_WARP, 1), 16),
    }  # fmt: skip
    return (batch * tokens,), arguments, constants


def _per_batch(vector: Tensor | None) -> int:
    """How many elements the rows of two batch entries are apart in `[1 or B, 1, C]`. Asking adds no guard."""
    return 0 if vector is None or statically_known_true(vector.shape[0] == 1) else vector.stride(0)
