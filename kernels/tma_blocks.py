"""TMA descriptors of tensors: what the copy engine of Hopper needs to know of them, and what it can address."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor


class Address:
    """What a descriptor needs to know of a tensor, without keeping the tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


def tma_descriptor(x: Tensor, rows: int) -> GluonDescriptor:
    """For Gluon: of `x` `[B, H, S, D]`, which `is_addressable`, for blocks of `rows` rows of one head.

    It does not keep `x` alive.
    """
    return _descriptor(x.shape, x.stride(), x.dtype, rows, None, x.data_ptr())


def triton_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The same for plain Triton, which chooses the layout itself; `columns` past the last of `x` read as zeros."""
    return _descriptor(x.shape, x.stride(), x.dtype, rows, columns, x.data_ptr())


@functools.lru_cache(4096)
def _descriptor(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int | None, address: int
) -> GluonDescriptor | TensorDescriptor:
    """Tensors come and go, but at the same addresses: making and checking descriptors takes longer than all else."""
    step = 16 // dtype.itemsize
    # A dimension of one element is never stepped over, and may have any stride.
    steps = [stride if size > 1 else step for size, stride in zip(shape[:3], strides[:3], strict=True)]
    tensor = (Address(address, dtype), list(shape), [*steps, 1])
    if columns is None:
        return GluonDescriptor(*tensor, *block_layout(dtype, rows, shape[-1]))
    return TensorDescriptor(*tensor, [1, 1, rows, columns])


def addressable(x: Tensor) -> Tensor:
    """`x`, or a copy, that `is_addressable`."""
    return x if is_addressable(x) else x.clone(memory_format=torch.contiguous_format)


def is_addressable(x: Tensor) -> bool:
    """Whether TMA can read and write `x` `[B, H, S, D]` where it is: at addresses of multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and _can_step(x.shape, x.stride(), x.element_size())


@functools.lru_cache(1024)
def _can_step(shape: torch.Size, strides: tuple[int, ...], element_size: int) -> bool:
    step = 16 // element_size
    stepped = [stride for size, stride in zip(shape[:3], strides[:3], strict=True) if size > 1]
    return strides[3] == 1 and all(stride > 0 and stride % step == 0 for stride in stepped)


def block_layout(dtype: torch.dtype, rows: int, head_dim: int) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Shape and layout in shared memory of `rows` rows of one head, 64 or 128 columns wide."""
    columns = 64 if head_dim <= 64 else 128
    width = min(128, columns * dtype.itemsize)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * dtype.itemsize, rank=4)
    return [1, 1, rows, columns], layout
