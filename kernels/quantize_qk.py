"""Queries and keys in 8 bits for the product QK^T: one scale per block of rows, keys around their mean.

Subtracting from all keys their mean over the sequence subtracts one number from all scores of a row, which softmax does
not see; what is left of keys with large channels in common fits 8 bits better (SageAttention, arXiv 2410.02367).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..skip_state import tile_count

QK_DTYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""By name: storage and largest magnitude."""


@triton.jit(do_not_specialize=["heads", "length"])
def _quantize_kernel(
    x, mean, quantized, scales, stride_b, stride_h, stride_s, heads, length, largest,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """One block of `ROWS` rows of one head, to `COLUMNS` columns of which those past `HEAD_DIM` are zeros."""
    block = tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    place = row.to(tl.int64)[:, None] * stride_s + column[None, :]
    values = tl.load(x + batch * stride_b + head * stride_h + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        common = tl.load(mean + tl.program_id(1) * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
        values = tl.where(inside, values - common[None, :], 0.0)
    scale = tl.max(tl.max(tl.abs(values), 1), 0)
    scale = tl.where(scale == 0, 1.0, scale / largest)
    # A maximum leaves NaN out, and 8 bits may have none: what the block gives has to be NaN.
    scale = tl.where(tl.max(tl.max((values != values).to(tl.int32), 1), 0) != 0, float("nan"), scale)
    values /= scale
    if quantized.dtype.element_ty == tl.int8:
        values = tl.floor(values + 0.5)
    quantized += tl.program_id(1).to(tl.int64) * length * COLUMNS
    tl.store(
        quantized + row.to(tl.int64)[:, None] * COLUMNS + column[None, :],
        values.to(quantized.dtype.element_ty),
        mask=(row < length)[:, None],
    )
    tl.store(scales + tl.program_id(1) * tl.num_programs(0) + block, scale)


def quantize(x: Tensor, name: str, rows: int, columns: int, center: bool) -> tuple[Tensor, Tensor]:
    """`x` in 8 bits, and the scale of each block of rows: `x` (less the mean of its rows) is about their product.

    Args:
        x: `[B, H, S, D]`, last stride 1.
        name: one of `QK_DTYPES`.
        columns: D of the result, at least that of `x`; zeros beyond.
        center: subtract the mean over S.

    Returns:
        contiguous `[B, H, S, columns]`, float32 `[B, H, ceil(S / rows)]`.
    """
    batch, heads, length, head_dim = x.shape
    dtype, largest = QK_DTYPES[name]
    blocks = tile_count(length, rows)
    mean = x.mean(2, dtype=torch.float32).contiguous() if center else None
    quantized = x.new_empty((batch, heads, length, columns), dtype=dtype)
    scales = x.new_empty((batch, heads, blocks), dtype=torch.float32)
    _quantize_kernel[blocks, batch * heads](
        x, mean, quantized, scales, *x.stride()[:3], heads, length, largest,
        HEAD_DIM=head_dim, COLUMNS=columns, ROWS=rows, HAS_MEAN=center, num_warps=8,
    )  # fmt: skip
    return quantized, scales
