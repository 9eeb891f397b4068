"""The op `lite_compile::normalize_rotate`: RMS norm and rotary embedding of queries or keys, on GPUs in one kernel.

Inductor inlines the kernel, so that it is launched like Inductor's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .kernels.rotary_triton import normalize_rotate_kernel, plan_launch


@triton_op("lite_compile::normalize_rotate", mutates_args={})
def normalize_rotate(x: Tensor, weight: Tensor | None, eps: float, per_head: bool, cos: Tensor, sin: Tensor) -> Tensor:
    """`y = rms_norm(x) * weight` in `x`'s dtype, then each pair of elements rotated.

    `out[2i] = y[2i] * cos[2i] - y[2i + 1] * sin[2i]` and `out[2i + 1] = y[2i] * sin[2i + 1] + y[2i + 1] * cos[2i + 1]`,
    in float32 and rounded to `x`'s dtype.

    Args:
        x: `[B, S, H, D]`, float16, bfloat16 or float32, D even.
        weight: `[D]` with `per_head`, else `[H * D]`, dense.
        per_head: whether the mean square is one head's, or the token's.
        cos, sin: float32 `[1 or B, S, 1, D]`, or `[1 or B, S, 1, D / 2]`: what the two elements of a pair share. The
            third dimension may be missing.

    Returns:
        `[B, S, H, D]`, dense.
    """
    if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, arguments, constants = plan_launch(x, weight, eps, per_head, cos, sin, out)
    wrap_triton(normalize_rotate_kernel)[grid](*arguments, **constants)
    return out


@normalize_rotate.register_kernel("cpu")
def normalize_rotate_cpu(
    x: Tensor, weight: Tensor | None, eps: float, per_head: bool, cos: Tensor, sin: Tensor
) -> Tensor:
    """The specification of the kernel."""
    tokens = x if per_head else x.flatten(2)
    y = torch.rms_norm(tokens, tokens.shape[-1:], weight, eps).view(x.shape).float()
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if cos.shape[3] != x.shape[3]:
        cos, sin = (table.repeat_interleave(2, -1) for table in (cos, sin))
    even, odd = y[..., 0::2], y[..., 1::2]
    swapped = torch.stack((-odd, even), -1).flatten(-2)
    return (y * cos + swapped * sin).to(x.dtype).contiguous()
