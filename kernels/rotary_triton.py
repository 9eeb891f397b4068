"""RMS normalisation and rotary embedding of queries or keys in one pass over memory.

The op `lite_compile::normalize_rotate` says what it computes (`rotary_op.py`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

MAX_ELEMENTS = 1 << 14
"""Most elements of a token, padded to powers of two: they stay in registers between the norm and the rotation."""
_ELEMENTS_PER_WARP = 2048


@triton.jit
def normalize_rotate_kernel(
    x, weight, cos, sin, out, tokens, eps, x_batch, x_token, cos_batch, cos_token, cos_dim, sin_batch, sin_token,
    sin_dim, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PER_HEAD: tl.constexpr, HAS_WEIGHT: tl.constexpr, PER_PAIR: tl.constexpr,
):  # fmt: skip
    """One token per program.

    Args:
        x, out: `[B, tokens, HEADS, DIM]`, the last two dimensions dense, `out` all of them.
        weight: `[DIM]` or `[HEADS * DIM]`, as `PER_HEAD` says.
        cos, sin: float32 of one head's elements or, with `PER_PAIR`, of its pairs; strides in elements.
    """
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    head, dim = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    index = head * DIM + dim
    value = tl.load(x + batch * x_batch + token * x_token + index, mask=inside, other=0).to(tl.float32)
    squares = tl.sum(value * value, axis=1, keep_dims=True)
    if PER_HEAD:
        value *= tl.rsqrt(squares / DIM + eps)
    else:
        value *= tl.rsqrt(tl.sum(squares, axis=0, keep_dims=True) / (HEADS * DIM) + eps)
    if HAS_WEIGHT:
        if PER_HEAD:
            value *= tl.load(weight + dim, mask=dim < DIM, other=0).to(tl.float32)
        else:
            value *= tl.load(weight + index, mask=inside, other=0).to(tl.float32)
    normed = value.to(x.dtype.element_ty).to(tl.float32)  # what the norm alone would have written
    even, odd = tl.split(tl.reshape(normed, (BLOCK_HEADS, BLOCK_DIM // 2, 2)))
    pair = tl.arange(0, BLOCK_DIM // 2)[None, :].to(tl.int64)  # strides may be long
    has_pair = pair < DIM // 2
    first = pair if PER_PAIR else 2 * pair
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    cos_even = tl.load(cos + first * cos_dim, mask=has_pair, other=0)
    sin_even = tl.load(sin + first * sin_dim, mask=has_pair, other=0)
    if PER_PAIR:
        cos_odd, sin_odd = cos_even, sin_even
    else:
        cos_odd = tl.load(cos + (first + 1) * cos_dim, mask=has_pair, other=0)
        sin_odd = tl.load(sin + (first + 1) * sin_dim, mask=has_pair, other=0)
    rotated = tl.join(even * cos_even - odd * sin_even, even * sin_odd + odd * cos_odd)
    rotated = tl.reshape(rotated, (BLOCK_HEADS, BLOCK_DIM))
    tl.store(out + program * (HEADS * DIM) + index, rotated.to(out.dtype.element_ty), mask=inside)


def is_supported(heads: int, dim: int) -> bool:
    """Whether a token of that many heads fits into registers, in pairs."""
    return dim % 2 == 0 and triton.next_power_of_2(heads) * triton.next_power_of_2(dim) <= MAX_ELEMENTS


def plan_launch(
    x: Tensor, weight: Tensor | None, eps: float, per_head: bool, cos: Tensor, sin: Tensor, out: Tensor
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments, and constants of the launch that fills `out`, `[B, S, H, D]` like `x`."""
    batch, tokens = x.shape[:2]
    heads, dim = map(int, x.shape[2:])  # symbols of known value may be among them
    blocks = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    per_batch = tuple(0 if table.shape[0] == 1 else table.stride(0) for table in (cos, sin))
    arguments = (
        x, weight, cos, sin, out, tokens, eps, x.stride(0), x.stride(1), per_batch[0], cos.stride(1), cos.stride(-1),
        per_batch[1], sin.stride(1), sin.stride(-1),
    )  # fmt: skip
    constants = {
        "HEADS": heads, "DIM": dim, "BLOCK_HEADS": blocks[0], "BLOCK_DIM": blocks[1],
        "PER_HEAD": per_head, "HAS_WEIGHT": weight is not None,
        "PER_PAIR": bool(cos.shape[-1] == dim // 2),
        "num_warps": min(max(blocks[0] * blocks[1] // _ELEMENTS_PER_WARP, 1), 16),
    }  # fmt: skip
    return (batch * tokens,), arguments, constants
