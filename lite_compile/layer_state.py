"""Where skip states and clocks live: with the model, keyed by the identity of its parameters, never by a graph.

One compiled graph serves many modules (parameters are graph inputs), and one module may be compiled several times. The
keys are held weakly, so deleting the model frees its state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .announce import active_generation
from .clock import clock_words
from .skip_state import TileShape

MAX_SHAPES = 8
"""Input shapes for which one layer keeps a state; beyond that the oldest is dropped (and would start dense)."""


@dataclass(frozen=True)
class LayerKey:
    """Which of the states that hang on one parameter."""

    ordinal: int
    """Number of the attention site among those of its graph that share the parameter."""
    shape: tuple[int, ...]
    tile: TileShape
    k_len: int
    device: torch.device


@dataclass(frozen=True)
class LayerState:
    """Skip state of one layer for one input shape."""

    layer: str
    state: Tensor
    """int32, as `skip_state` lays it out."""
    clock: Tensor
    """The clock of the model that the layer belongs to."""
    max_streams: int
    tile: TileShape
    q_len: int
    k_len: int


_lock = threading.RLock()
_layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_clocks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def find_clock(anchor: Tensor, max_streams: int, device: torch.device, announced: bool) -> Tensor:
    """The clock of the model that parameter `anchor` identifies; allocated on first use.

    `announced`: the clock that the user's `generation` drives, rather than the one that advances by itself.
    """
    with _lock:
        clocks = _clocks.setdefault(anchor, {})
        key = (max_streams, device, announced)
        if key not in clocks:
            clocks[key] = _zeros((clock_words(max_streams),), device)
        clock: Tensor = clocks[key]
    if announced and (generation := active_generation(anchor)) is not None:
        generation.attach(clock)
    return clock


def find_layer_state(weight: Tensor, key: LayerKey, layer: str, clock: Tensor, q_len: int) -> Tensor:
    """The skip state of the layer that parameter `weight` identifies; allocated, empty, on first use per shape."""
    with _lock:
        states = _layers.setdefault(weight, {})
        found = states.get(key)
        if found is None or found.clock is not clock:
            while len(states) >= MAX_SHAPES:
                del states[next(iter(states))]
            state = _zeros(key.shape, key.device)
            found = LayerState(layer, state, clock, key.shape[0], key.tile, q_len, key.k_len)
            states[key] = found
        result: Tensor = found.state
        return result


def layer_states(parameters: list[Tensor] | None = None) -> Iterator[LayerState]:
    """All skip states, or those of the layers that the given parameters identify."""
    with _lock:
        keys = list(_layers.keys()) if parameters is None else [p for p in parameters if p in _layers]
        found = [state for key in keys for state in _layers[key].values()]
    return iter(found)


def clocks(parameters: list[Tensor] | None = None) -> list[Tensor]:
    """All clocks, or those of the models that the given parameters belong to."""
    with _lock:
        keys = list(_clocks.keys()) if parameters is None else [p for p in parameters if p in _clocks]
        return [clock for key in keys for clock in _clocks[key].values()]


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # A tensor made under inference mode could not be mutated outside of it.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.int32, device=device)
