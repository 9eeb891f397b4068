"""Run a compiled graph with the state of whichever model it is called for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .layer_state import LayerKey, find_clock, find_layer_state
from .passes.graph_inputs import fake_value, placeholders
from .passes.rewrite_attention import StateInput

Size = int | torch.SymInt


class SizeResolver:
    """Evaluates symbolic sizes of a graph from the arguments of a call."""

    def __init__(self, inputs: Sequence[fx.Node]) -> None:
        self._bindings: dict[sympy.Symbol, Callable[[Sequence[Any]], int]] = {}
        for index, node in enumerate(inputs):
            value = fake_value(node)
            if isinstance(value, torch.SymInt):
                self._bind(value, partial(_read_int, index))
            elif isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    self._bind(size, partial(_read_size, index, dim))
        self._cache: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}

    def _bind(self, size: Size, read: Callable[[Sequence[Any]], int]) -> None:
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if isinstance(expression, sympy.Symbol):
            self._bindings.setdefault(expression, read)

    def resolve(self, sizes: Sequence[Sequence[Size]], args: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
        """`sizes` as integers, for a call with `args`. Always asked for the same sizes."""
        values = tuple(read(args) for read in self._bindings.values())
        resolved = self._cache.get(values)
        if resolved is None:
            substitution = dict(zip(self._bindings, map(sympy.Integer, values), strict=True))
            resolved = tuple(tuple(_evaluate(size, substitution) for size in group) for group in sizes)
            self._cache[values] = resolved
        return resolved


def _read_int(index: int, args: Sequence[Any]) -> int:
    return int(args[index])


def _read_size(index: int, dim: int, args: Sequence[Any]) -> int:
    return int(args[index].shape[dim])


def _evaluate(size: Size, substitution: dict[sympy.Symbol, sympy.Integer]) -> int:
    return size if isinstance(size, int) else int(size.node.expr.xreplace(substitution))


@dataclass(frozen=True)
class StateInputs:
    """What a rewritten graph expects after the inputs of the original: the clock, then one state per layer."""

    layers: tuple[StateInput, ...]
    max_streams: int
    device: torch.device
    announced: bool
    """Whether the user's `generation` drives the clock."""


class StatefulGraph:
    """Callable that Dynamo gets: appends the clock and the skip states of the model at hand to the arguments."""

    def __init__(self, compiled: Callable[..., Any], graph: fx.Graph, state: StateInputs) -> None:
        inputs = placeholders(graph)
        position = {node: index for index, node in enumerate(inputs)}
        self._compiled = compiled
        self._state = state
        self._weights = [position[layer.weight] for layer in state.layers]
        self._resolver = SizeResolver(inputs)
        self._sizes = [(*layer.shape, layer.q_len, layer.k_len) for layer in state.layers]

    def __call__(self, *args: Any) -> Any:
        state = self._state
        clock = find_clock(args[self._weights[0]], state.max_streams, state.device, state.announced)
        return self._compiled(*args, clock, *self._find_states(args, clock))

    def _find_states(self, args: Sequence[Any], clock: Tensor) -> list[Tensor]:
        resolved = self._resolver.resolve(self._sizes, args)
        found = []
        for layer, weight, (*shape, q_len, k_len) in zip(self._state.layers, self._weights, resolved, strict=True):
            key = LayerKey(layer.ordinal, tuple(shape), layer.tile, k_len, self._state.device)
            found.append(find_layer_state(args[weight], key, layer.layer, clock, q_len))
        return found
