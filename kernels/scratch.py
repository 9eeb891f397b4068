"""Several tensors in one allocation: each costs the host as much as a launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes between the beginnings of tensors are multiples of it, as those of torch are of 512."""


class Part(NamedTuple):
    """One tensor of a `Scratch`."""

    start: int
    """Bytes before it."""
    size: int
    """Bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype


class Scratch(NamedTuple):
    """Where in a buffer its tensors lie."""

    parts: tuple[Part, ...]
    size: int
    """Bytes of the buffer."""

    @classmethod
    def of(cls, *tensors: tuple[Sequence[int], torch.dtype]) -> Scratch:
        """Room for tensors of these shapes and dtypes, in this order."""
        parts, start = [], 0
        for shape, dtype in tensors:
            size = math.prod(shape) * dtype.itemsize
            parts.append(Part(start, size, tuple(shape), dtype))
            start += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts), start)

    def allocate(self, device: torch.device) -> Tensor:
        """An empty buffer."""
        return torch.empty(self.size, dtype=torch.uint8, device=device)

    def tensors(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in `buffer`."""
        return [buffer[p.start : p.start + p.size].view(p.dtype).view(p.shape) for p in self.parts]

    def addresses(self, buffer: Tensor) -> list[int]:
        """Where the tensors begin."""
        start = buffer.data_ptr()
        return [start + part.start for part in self.parts]
