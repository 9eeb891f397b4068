"""Launch a compiled kernel without asking again what to compile, nor what to do around a launch."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


def kinds(arguments: Sequence[int]) -> tuple[Hashable, ...]:
    """What Triton distinguishes of integers: 1, multiples of 16, those of 64 bits."""
    return tuple((x == 1, x % 16 == 0, -(2**31) <= x < 2**31) for x in arguments)


def address_of(x: Tensor | None) -> int | None:
    """What a compiled kernel takes in place of a tensor. It spares the launch asking for it, and asking the driver."""
    return None if x is None else x.data_ptr()


@functools.cache
def multiprocessors(device: int) -> int:
    """How many multiprocessors the CUDA device of that index has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Launch:
    """Launches one variant of a `triton.jit` or `gluon.jit` function, whose constants are its last parameters."""

    def __init__(self, function: Any, device: int, constants: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._function, self._device = function, device
        self._constants, self._options, self._values = constants, options, tuple(constants.values())
        self._compiled: Any = None
        self._direct = True
        self.ready = False
        """Whether it is compiled, so that addresses do instead of tensors; never under Triton's interpreter."""

    def __call__(self, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        """Launch a grid of programs on the device, which has to be the current one."""
        compiled = self._compiled
        if compiled is None:
            self._compiled = self._function[grid](*arguments, **self._constants, **self._options)
            self.ready = self._compiled is not None
        elif self._direct and not _is_watched():
            # What `compiled[grid]` does, less a closure and two hooks that call nobody.
            stream = driver.active.get_current_stream(self._device)
            try:
                compiled.run(
                    *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments,
                    *self._values,
                )  # fmt: skip
            except TypeError:  # a release of Triton that launches otherwise, which shows before it launches
                self._direct = False
                compiled[grid](*arguments, *self._values)
        else:
            compiled[grid](*arguments, *self._values)


def _is_watched() -> bool:
    """Whether a profiler wants to know of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


class Launcher:
    """The variants of one function.

    Triton's own launch looks at each argument to decide which compiled variant serves, which takes the host longer than
    a small kernel takes the GPU. Here the caller names the variant. Pointers and integers of the function must
    therefore be `do_not_specialize` (and `do_not_specialize_on_alignment`), or part of the name: of integers their
    `kinds`, of pointers whether they are multiples of 16.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._variants: dict[Hashable, Launch] = {}

    def variant(self, device: int, name: Hashable, constants: Mapping[str, Any], **options: Any) -> Launch:
        """The launch of one variant on the CUDA device of that index.

        Args:
            name: equal for calls that the same compiled kernel serves, constants and options apart.
        """
        key = (device, name, *constants.values())
        if key not in self._variants:
            self._variants[key] = Launch(self._function, device, constants, options)
        return self._variants[key]
