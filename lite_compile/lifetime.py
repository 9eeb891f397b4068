"""Learn that a tensor is gone, after which another one may have its `id`."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_KEY = "_lite_compile_life"


class _Life:
    """Kept in a tensor's `__dict__`, so that it goes with it."""

    __slots__ = ("__weakref__",)

    def __deepcopy__(self, memo: object) -> _Life:
        return _Life()

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which `torch.load` takes from any file, and we take for nothing


class Watch:
    """Whether a tensor is still there.

    `torch.utils.swap_tensors`, with which modules move parameters of tensor subclasses (torchao's), refuses any that
    has a weak reference. These are watched by a companion instead, which goes where the contents are swapped to.
    """

    def __init__(self, tensor: Tensor, on_end: Callable[[object], None]) -> None:
        """`on_end` is called when it goes; it gets nothing of use."""
        self._id = id(tensor)
        self.by_companion = is_traceable_wrapper_subclass(tensor) or _moves_by_swapping()
        """Whether `is_of` has to be asked; else nothing but the end of the tensor ends the watch."""
        self._reference: weakref.ref[Any] = weakref.ref(_life(tensor) if self.by_companion else tensor, on_end)

    @property
    def alive(self) -> bool:
        """Whether it has not gone."""
        return self._reference() is not None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one that is watched, with the contents that it had."""
        if id(tensor) != self._id:
            return False
        found = self._reference()
        return found is not None and (not self.by_companion or tensor.__dict__.get(_KEY) is found)


def _life(tensor: Tensor) -> _Life:
    life = tensor.__dict__.get(_KEY)
    if not isinstance(life, _Life):
        life = tensor.__dict__[_KEY] = _Life()
    return life


def _moves_by_swapping() -> bool:
    return torch.__future__.get_swap_module_params_on_conversion()
