"""Launch a compiled kernel without asking again what to compile."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def kinds(arguments: Sequence[Tensor | int | None]) -> tuple[Hashable, ...]:
    """What Triton distinguishes of pointers and integers: dtype and alignment, 1, multiples of 16, those of 64 bits."""
    return tuple(map(_kind, arguments))


def _kind(argument: Tensor | int | None) -> Hashable:
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return None if argument is None else (argument.dtype, argument.data_ptr() % 16 == 0)


class Launcher:
    """Launches one `triton.jit` or `gluon.jit` function, whose constants are its last parameters.

    Triton's own launch looks at each argument to decide which compiled variant serves, which takes the host longer than
    a small kernel takes the GPU. Here the caller names the variant. Pointers and integers of the function must
    therefore be `do_not_specialize` (and `do_not_specialize_on_alignment`), or their `kinds` part of the name.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        variant: Hashable,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Launch a grid of programs on the current device.

        Args:
            variant: equal for calls that the same compiled kernel serves, constants and options apart.
        """
        key = (torch.cuda.current_device() if torch.cuda.is_available() else -1, variant, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            # None under Triton's interpreter.
            self._compiled[key] = self._function[grid](*arguments, **constants, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
