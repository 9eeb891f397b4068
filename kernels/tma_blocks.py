"""TMA descriptors of tensors: what the copy engine of Hopper needs to know of them, and what it can address."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def tma_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of `x` `[B, H, S, D]`, or of a copy, for blocks of `rows` rows of one head."""
    if not is_addressable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    # Checking a descriptor takes longer than all else here; what was checked once differs in its address alone.
    descriptor = copy.copy(_blank_descriptor(x.shape, x.stride(), x.dtype, rows))
    descriptor.base = x
    return descriptor


@functools.lru_cache(1024)
def _blank_descriptor(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int) -> TensorDescriptor:
    """A descriptor of a tensor of that shape and dtype with those strides, without the tensor."""
    step = 16 // dtype.itemsize
    # A dimension of one element is never stepped over, and may have any stride.
    steps = [stride if size > 1 else step for size, stride in zip(shape[:3], strides[:3], strict=True)]
    blank = torch.empty((), dtype=dtype, device="meta")
    return TensorDescriptor(blank, list(shape), [*steps, 1], *block_layout(dtype, rows, shape[-1]))


def is_addressable(x: Tensor) -> bool:
    """Whether TMA can read and write `x` `[B, H, S, D]` where it is: at addresses of multiples of 16 bytes."""
    step = 16 // x.element_size()
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % step == 0 for stride in strides)


def block_layout(dtype: torch.dtype, rows: int, head_dim: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Shape and layout in shared memory of `rows` rows of one head, 64 or 128 columns wide."""
    columns = 64 if head_dim <= 64 else 128
    width = min(128, columns * dtype.itemsize)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * dtype.itemsize, rank=4)
    return [1, 1, rows, columns], layout
