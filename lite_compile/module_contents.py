"""Whether a module still consists of the parameters and buffers that it had, as they were. Asked once per call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer_state import versions
from .lifetime import Watch


class ModuleContents:
    """The parameters, buffers and submodules of a module and of all modules in it, held weakly."""

    def __init__(self, module: nn.Module) -> None:
        self._gone = False
        """Whether one of them is gone: its id may come back as another one's."""
        forget = partial(_forget, weakref.ref(self))
        modules = list(module.modules())
        self._modules = [weakref.ref(part, forget) for part in modules]
        owned, inner = _read(modules)
        self._owned, self._inner = list(map(id, owned)), list(map(id, inner))
        tensors = [x for x in owned if x is not None]
        self._watches = {id(x): Watch(x, forget) for x in tensors}
        self._swappable = any(watch.by_companion for watch in self._watches.values())
        self._versions = versions(tensors)

    def unchanged(self) -> bool:
        """Whether nothing was added, removed, replaced or written to since."""
        if self._gone:
            return False
        modules = [reference() for reference in self._modules]
        if None in modules:  # another thread is taking the model apart
            return False
        owned, inner = _read(modules)
        if list(map(id, owned)) != self._owned or list(map(id, inner)) != self._inner:
            return False
        tensors = [x for x in owned if x is not None]
        if self._swappable and not all(self._watches[id(x)].is_of(x) for x in tensors):
            return False
        return versions(tensors) == self._versions


def module_tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [x for x in _read(list(module.modules()))[0] if x is not None]


def _read(modules: Sequence[Any]) -> tuple[list[Tensor | None], list[nn.Module | None]]:
    """Parameters and buffers, and submodules of all `modules`. Most have none: asking first is the quickest."""
    parameters = [owned for module in modules if (owned := module._parameters)]
    buffers = [owned for module in modules if (owned := module._buffers)]
    inner = [parts for module in modules if (parts := module._modules)]
    tensors = [x for owned in (*parameters, *buffers) for x in owned.values()]
    return tensors, [x for parts in inner for x in parts.values()]


def _forget(contents: weakref.ref[ModuleContents], _: object) -> None:
    if (found := contents()) is not None:
        found._gone = True
