"""The ops `lite_compile::add_normalize` and `lite_compile::normalize`: layer norm with what surrounds it in a block.

On GPUs either is one kernel, which Inductor inlines, so that it is launched like Inductor's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .kernels.layer_norm_triton import add_normalize_kernel, plan_launch


@triton_op("lite_compile::add_normalize", mutates_args={})
def add_normalize(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum = x + y * gate` and `normalize(sum)`, each computed in float32 and rounded to `x`'s dtype.

    Args:
        x, y: `[B, S, C]`, float16, bfloat16 or float32.
        gate: `[1 or B, 1, C]`, float32 or `x`'s dtype; None is 1.
        weight, bias, scale, shift, eps: as in `normalize`.

    Returns:
        The sum and its norm, `[B, S, C]`, dense.
    """
    x, y = x.contiguous(), y.contiguous()
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    gate, weight, bias, scale, shift = map(_with_dense_rows, (gate, weight, bias, scale, shift))
    grid, arguments, constants = plan_launch(x, y, gate, weight, bias, scale, shift, eps, total, normed)
    wrap_triton(add_normalize_kernel)[grid](*arguments, **constants)
    return total, normed


@triton_op("lite_compile::normalize", mutates_args={})
def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """`(layer_norm(x) * weight + bias) * scale + shift` in float32, rounded to `x`'s dtype.

    Args:
        x: `[B, S, C]`, float16, bfloat16 or float32; the norm is over C.
        weight, bias: `[C]` of any float dtype; None is 1 and 0.
        scale, shift: `[1 or B, 1, C]`, float32 or `x`'s dtype; None is 1 and 0.

    Returns:
        `[B, S, C]`, dense.
    """
    x = x.contiguous()
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, bias, scale, shift = map(_with_dense_rows, (weight, bias, scale, shift))
    grid, arguments, constants = plan_launch(x, None, None, weight, bias, scale, shift, eps, None, normed)
    wrap_triton(add_normalize_kernel)[grid](*arguments, **constants)
    return normed


def _with_dense_rows(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.stride(-1) == 1 else vector.contiguous()


@add_normalize.register_kernel("cpu")
def add_normalize_cpu(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The specification of the kernel."""
    added = y.float() if gate is None else y.float() * gate.float()
    total = (x.float() + added).to(x.dtype).contiguous()
    return total, normalize_cpu(total, weight, bias, scale, shift, eps)


@normalize.register_kernel("cpu")
def normalize_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """The specification of the kernel."""
    weight, bias = (None if vector is None else vector.float() for vector in (weight, bias))
    normed = torch.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        normed = normed * scale.float()
    if shift is not None:
        normed = normed + shift.float()
    return normed.to(x.dtype).contiguous()
