"""Whether a module still consists of the parameters and buffers that it had, as they were."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .layer_state import versions
from .lifetime import Watch

_contents = operator.attrgetter("_parameters", "_buffers", "_modules")


class ModuleContents:
    """The parameters, buffers and submodules of a module and of all modules in it, none of which it keeps alive."""

    def __init__(self, module: nn.Module, without: Sequence[nn.Module] = ()) -> None:
        """Of the parts `without`, it counts only that they are where they were, not what is in them."""
        self._gone = False
        """Whether one of them is gone: its id may come back as another one's."""
        forget = partial(_forget, weakref.ref(self))
        left_out = {part for whole in without for part in whole.modules()}
        modules = [part for part in module.modules() if part not in left_out]
        self._modules = [weakref.ref(part, forget) for part in modules]
        self._without = [weakref.ref(part, forget) for part in without]
        entries = _read(modules)
        self._entries = list(map(id, entries))
        places = [place for place, x in enumerate(entries) if isinstance(x, Tensor)]
        self._pick = picker(places)
        tensors = self._pick(entries)
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
        entries = _read(modules)
        if list(map(id, entries)) != self._entries:
            return False
        tensors = self._pick(entries)
        if self._swappable and not all(self._watches[id(x)].is_of(x) for x in tensors):
            return False
        return versions(tensors) == self._versions


def module_tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [x for x in _read(module.modules()) if isinstance(x, Tensor)]


def _read(modules: Iterable[Any]) -> list[Any]:
    """Parameters, buffers and submodules of all `modules`, None included; without a loop, since there are thousands."""
    filled = list(filter(None, itertools.chain.from_iterable(map(_contents, modules))))
    try:
        return list(itertools.chain.from_iterable(map(dict.values, filled)))
    except TypeError:  # TorchScript has containers of its own, several times slower to read
        return list(itertools.chain.from_iterable(contents.values() for contents in filled))


def picker(places: list[int]) -> Any:
    """A function that picks what lies at `places` of a sequence, as a sequence."""
    if len(places) < 2:
        return lambda entries: [entries[place] for place in places]
    return operator.itemgetter(*places)


def _forget(contents: weakref.ref[ModuleContents], _: object) -> None:
    if (found := contents()) is not None:
        found._gone = True
