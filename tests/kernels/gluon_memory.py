"""What a Gluon kernel holds in registers, shared and global memory, for `gluon_machine`: it says so when misused."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Block(Tensor):
    """A value in registers: operators make new ones."""

    def __iadd__(self, other: Any) -> Tensor:
        return self + other

    def __imul__(self, other: Any) -> Tensor:
        return self * other

    def __itruediv__(self, other: Any) -> Tensor:
        return self / other

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.view(dtype) if bitcast else super().to(dtype)

    @property
    def type(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(layout=None)


def block(value: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    """`value` as an argument of a kernel or as one of its values."""
    return torch.as_tensor(value, dtype=dtype).as_subclass(Block)


class Pointer:
    """Into a tensor, whose bounds each access is held against."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory.view(-1), offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset - offset)

    def to(self, dtype: Any) -> Pointer:
        return self

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset, inside = torch.broadcast_tensors(
            torch.as_tensor(self.offset), torch.as_tensor(True if mask is None else mask)
        )
        assert ((offset >= 0) & (offset < len(self.memory)))[inside].all(), "outside of a tensor"
        return offset.long(), inside


class Cell:
    """One buffer in shared memory, with what the hardware is doing to it."""

    def __init__(self, pause: Callable[[], None], shape: Sequence[int], dtype: torch.dtype) -> None:
        self.pause, self.shape, self.dtype = pause, list(shape), dtype
        self.writing, self.readers = False, 0
        self.spoil()

    def spoil(self) -> None:
        self.value: Any = torch.full(self.shape, 77).to(self.dtype).as_subclass(Block)


class Region:
    """A buffer in shared memory as it is looked at."""

    def __init__(self, cell: Cell, view: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.cell, self._view = cell, view

    def reshape(self, shape: Sequence[int]) -> Region:
        return Region(self.cell, lambda x: self._view(x).reshape(*shape))

    def permute(self, order: Sequence[int]) -> Region:
        return Region(self.cell, lambda x: self._view(x).permute(*order))

    def look(self) -> Any:
        """What is there."""
        assert not self.cell.writing, "read while it is written"
        return self._view(self.cell.value) if isinstance(self.cell.value, Tensor) else self.cell.value

    def load(self, layout: Any) -> Any:
        self.cell.pause()
        return self.look()

    def store(self, value: Any) -> None:
        self.cell.pause()
        assert not self.cell.writing, "written twice"
        assert not self.cell.readers, "written while it is read"
        self.cell.value = value.reshape(self.cell.shape) if isinstance(value, Tensor) else value


class Shared:
    """Buffers of one shape in shared memory."""

    def __init__(self, pause: Callable[[], None], dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.dtype, self.shape = dtype, list(shape)
        self._cells = [Cell(pause, shape[1:], dtype) for _ in range(shape[0])]

    def index(self, i: Any) -> Region:
        return Region(self._cells[int(i)])


class Barrier:
    """An mbarrier."""

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.parity = 0

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        self.bytes += expected
        self.pending -= count
        assert self.pending >= 0, "more arrivals than the phase has"
        self.complete(0)

    def complete(self, size: int) -> None:
        self.bytes -= size
        if self.pending == self.bytes == 0:
            self.parity ^= 1
            self.pending = self.count


class Descriptor:
    """Of `[B, H, S, D]`, for blocks of `rows` rows; `columns` past the last read as zeros."""

    layout = None

    def __init__(self, x: Tensor, rows: int, columns: int) -> None:
        self.x, self.dtype, self.block_shape = x, x.dtype, [1, 1, rows, columns]
        self.block_type = types.SimpleNamespace(nbytes=rows * columns * x.itemsize)
        self.loads = 0

    def _inside(self, place: Sequence[Any]) -> Tensor:
        b, h, row, _ = map(int, place)
        return self.x[b, h, row : row + self.block_shape[2]]

    def read(self, place: Sequence[Any]) -> Tensor:
        self.loads += 1
        inside = self._inside(place)
        found = torch.zeros(self.block_shape, dtype=self.dtype).as_subclass(Block)
        found[0, 0, : inside.shape[0], : inside.shape[1]] = inside
        return found

    def write(self, place: Sequence[Any], value: Tensor) -> None:
        inside = self._inside(place)
        inside.copy_(value[0, 0, : inside.shape[0], : inside.shape[1]])
