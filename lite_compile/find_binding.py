"""Find whose state a call uses: the binding of the model whose parameters and buffers are among the arguments."""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from .layer_state import Binding
from .lifetime import Watch

MAX_BINDINGS = 16
"""Graphs and models that share a first layer and keep their states; beyond that the least recently used is dropped."""
MAX_RECENT = 512
"""Models that one graph finds without a search."""

_by_first_tensor: dict[int, tuple[Watch, list[Binding]]] = {}
"""By the id of the first tensor, for as long as that lives."""
_lock = threading.RLock()
_calls = itertools.count(1)


class BindingFinder:
    """`find_binding` for one graph, which most often is called for a model that it has been called for before."""

    def __init__(self, graph_key: Hashable, words: int, device: torch.device) -> None:
        self._graph_key, self._words, self._device = graph_key, words, device
        self._recent: dict[int, weakref.ref[Binding]] = {}
        """By the id of the first tensor, which may be another tensor's by now."""

    def find(self, tensors: Sequence[Tensor]) -> Binding:
        """The binding of the model that consists of `tensors`."""
        reference = self._recent.get(id(tensors[0]))
        binding = None if reference is None else reference()
        if binding is None or not binding.consists_of(tensors) or not binding.unchanged(tensors):
            binding = find_binding(self._graph_key, tensors, self._words, self._device)
            if len(self._recent) >= MAX_RECENT:
                self._recent.clear()
            self._recent[id(tensors[0])] = weakref.ref(binding)
        else:
            binding.rewrites = 0
            binding.calls += 1
            binding.last_call = next(_calls)
        return binding


def find_binding(graph_key: Hashable, tensors: Sequence[Tensor], words: int, device: torch.device) -> Binding:
    """The binding of the model that `tensors` identify, under the graph of that key; made on first use.

    Args:
        tensors: weights of the graph's rewritten layers, in their order, and all other parameters and buffers.
        words: length of the clock.
    """
    with _lock:
        candidates = _candidates(tensors[0])  # models may share their first layer
        found = next((binding for binding in candidates if binding.serves(graph_key, tensors)), None)
        rewrites = 0
        if found is not None:
            candidates.remove(found)
            if not found.unchanged(tensors):
                rewrites = found.rewrites + 1
                found = None
        if found is None:
            found = Binding(graph_key, tensors, words, device)
        found.rewrites = rewrites
        found.calls += 1
        found.last_call = next(_calls)
        living = [binding for binding in candidates if not binding.expired]
        living.sort(key=operator.attrgetter("last_call"))
        candidates[:] = [*living[-MAX_BINDINGS + 1 :], found]  # the least recently used go
        return found


def _candidates(first: Tensor) -> list[Binding]:
    """The bindings that begin with that tensor, to be changed in place."""
    watch, found = _by_first_tensor.get(id(first), (None, []))
    if watch is None or not watch.is_of(first):
        found = []
        _by_first_tensor[id(first)] = Watch(first, partial(_drop, id(first))), found
    return found


def _drop(first: int, reference: object) -> None:
    # By the time that this runs the id may be another tensor's.
    watch, _ = _by_first_tensor.get(first, (None, []))
    if watch is not None and not watch.alive:
        _by_first_tensor.pop(first, None)
