"""Where skip states and clocks live: with the model that a compiled graph is called for.

A compiled graph serves many modules (parameters are graph inputs), and a module may be compiled several times, under
other options or with other constants. State therefore belongs to one set of parameters and buffers *and* one graph
text: a `Binding`. Compiling the same text again finds the same state. Parameters are not held: it dies with them.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .announce import active_generation
from .density_history import history_shape, probe_shape
from .key_ranges import NO_RANGES, KeyRanges
from .lifetime import Watch
from .mask_watch import MaskWatch
from .options import LayerNames
from .overrides import RangesInForce, ThresholdsInForce, check_lengths, combine_ranges, overrides_of
from .skip_state import TileShape

_numbers = itertools.count(1)

MAX_SHAPES = 8
"""Input shapes for which a model keeps states; beyond that the least recently used is dropped."""


@dataclass(frozen=True)
class LayerSpec:
    """What one layer of a graph needs, symbolic sizes resolved."""

    layer: str
    shape: tuple[int, ...]
    """int32 `[streams, B, H, q_tiles, row_words]`."""
    tile: TileShape
    q_len: int
    k_len: int


@dataclass(frozen=True)
class LayerState:
    """Skip state of one layer for one input shape."""

    spec: LayerSpec
    state: Tensor
    clock: Tensor
    """The clock of the model that the layer belongs to."""
    history: Tensor | None = None
    """Where the option `history` asks for it: int64 `[streams, HISTORY_STEPS, 2]`, see `density_history`."""
    probe: Tensor | None = None
    """With the option `probe`: float64 `[streams, HISTORY_STEPS, 3]`."""
    latest: bool = True
    """Whether no other input shape was used since."""

    @property
    def layer(self) -> str:
        return self.spec.layer

    @property
    def max_streams(self) -> int:
        return self.spec.shape[0]


class Binding:
    """Clock and skip states of one model under one graph text."""

    def __init__(self, graph_key: Hashable, tensors: Sequence[Tensor], words: int, device: torch.device) -> None:
        self.number = next(_numbers)
        """No other binding's, ever."""
        self._graph_key = graph_key
        self._ids = [id(tensor) for tensor in tensors]  # good for as long as none of them is gone
        expire = partial(_expire, weakref.ref(self))
        self._watches = [Watch(tensor, expire) for tensor in tensors]
        self._swappable = any(watch.by_companion for watch in self._watches)
        self._versions = versions(tensors)
        self.expired = False
        """Whether a tensor is gone: its id may come back as another one's."""
        self._device = device
        self._states: OrderedDict[tuple[LayerSpec, ...], list[LayerState]] = OrderedDict()
        self._latest: tuple[tuple[LayerSpec, ...] | None, tuple[Tensor, ...]] = None, ()
        """What was asked for last."""
        self.lock = threading.RLock()
        """Held during a call: two threads that use one model take turns."""
        self.clock = _zeros((words,), device)
        self.thresholds = ThresholdsInForce(device)
        self.ranges = RangesInForce(device)
        self.default_ranges = NO_RANGES
        """Those that the model was compiled with."""
        self.rewrites = 0
        """How often in a row the model had other contents than at its call before."""
        self.calls = 0
        self.last_call = 0
        """Orders bindings by use: number of the last call, counted over all bindings."""
        self.names: tuple[str, ...] = ()
        """Qualified names of the layers, where the graph only knows the last part of them."""
        self.served = 0
        """Number of the last call of the root that used these states."""
        self.mask_watch: MaskWatch | None = None
        self.followed: tuple[LayerNames, int, tuple[str, ...]] | None = None
        """What the table of thresholds was made sure to follow last: which layers may use their state, which override
        was the latest, and the layers of the root."""
        with _registry_lock:
            _registry.add(self)

    def serves(self, graph_key: Hashable, tensors: Sequence[Tensor]) -> bool:
        """Whether this is the graph, and these are the parameters and buffers that identify the model."""
        return graph_key == self._graph_key and self.consists_of(tensors)

    def consists_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the parameters and buffers that identify the model."""
        if self.expired or list(map(id, tensors)) != self._ids:
            return False
        return not self._swappable or all(w.is_of(x) for w, x in zip(self._watches, tensors, strict=True))

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether none of them was written to since (a fused LoRA, a prompt in a buffer)."""
        return self._versions == versions(tensors)

    def belongs_to(self, parameters: set[int]) -> bool:
        """Whether the model has one of these parameters or buffers (by id)."""
        return not parameters.isdisjoint(self.ids())

    def is_part_of(self, model: nn.Module) -> bool:
        """Whether all that identifies the model is in `model`."""
        owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return not self.expired and owned.issuperset(self._ids)

    def states(self, specs: tuple[LayerSpec, ...], history: bool = False, probe: bool = False) -> tuple[Tensor, ...]:
        """The states for one input shape, in the order of the graph's layers, then their histories and probes.

        They are empty on first use. `history` and `probe` are the same at each call: they are part of the graph.
        """
        if specs is self._latest[0]:
            return self._latest[1]
        found = self._states.get(specs)
        if found is None:
            while len(self._states) >= MAX_SHAPES:
                self._states.popitem(last=False)
            names = self.names or [spec.layer for spec in specs]
            named = [replace(spec, layer=name) for spec, name in zip(specs, names, strict=True)]
            found = [self._empty_state(spec, history, probe) for spec in named]
            self._states[specs] = found
        self._states.move_to_end(specs)
        tensors = [*(x.state for x in found), *(x.history for x in found), *(x.probe for x in found)]
        self._latest = specs, tuple(tensor for tensor in tensors if tensor is not None)
        return self._latest[1]

    def _empty_state(self, spec: LayerSpec, history: bool, probe: bool) -> LayerState:
        state = _zeros(spec.shape, self._device)
        record = _zeros(history_shape(spec.shape[0]), self._device, torch.int64) if history else None
        dropped = _zeros(probe_shape(spec.shape[0]), self._device, torch.float64) if probe else None
        return LayerState(spec, state, self.clock, record, dropped)

    def listen(self) -> None:
        """Let the user's active `generation`, if it covers this model, drive the clock."""
        anchor = self.ids()[0]
        generation = None if anchor is None else active_generation([anchor])
        if generation is not None:
            generation.attach(self.clock)

    def move_to(self, clock: Tensor, names: Sequence[str]) -> None:
        """Follow another clock from now on, with empty states; `names` of the layers in its module."""
        self.clock, self.names, self.mask_watch, self.followed = clock, tuple(names), None, None
        self._states.clear()
        self._latest = None, ()

    def ids(self) -> list[int | None]:
        """Of the parameters and buffers that identify the model, those of layers first; None for one that is gone."""
        return [number if watch.alive else None for number, watch in zip(self._ids, self._watches, strict=True)]

    def all_states(self) -> list[LayerState]:
        """The states for all shapes, the most recently used shape first."""
        recent = enumerate(reversed(list(self._states.values())))
        return [replace(state, latest=number == 0) for number, states in recent for state in states]

    def check_ranges(self, ranges: KeyRanges) -> None:
        """Raise `OptionValueError` if ranges that are to be set do not fit the graph or its layers."""
        before = [override.ranges for override in overrides_of(self.ids())]
        combined = combine_ranges(self.default_ranges, [ranges, *before])
        check_lengths(combined, [(state.layer, state.spec.k_len) for state in self.all_states()])

    def void(self) -> None:
        """Empty all skip masks."""
        with torch.inference_mode(False), torch.no_grad():
            for state in itertools.chain(*self._states.values()):
                state.state.zero_()

    def weights(self) -> list[int]:
        """Ids of the weights that identify the layers; none if the model is gone."""
        layers = max(map(len, self._states), default=0)
        return [] if self.expired else self._ids[:layers]


def _expire(binding: weakref.ref[Binding], _: object) -> None:
    if (found := binding()) is not None:
        found.expired = True


_registry: weakref.WeakSet[Binding] = weakref.WeakSet()
_registry_lock = threading.RLock()


def bindings(model: nn.Module | None = None) -> list[Binding]:
    """All bindings (None), or those that use a parameter or buffer of `model`, which may be a part of one."""
    with _registry_lock:
        found = list(_registry)
    if model is None:
        return found
    parameters = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return [binding for binding in found if binding.belongs_to(parameters)]


def layer_states(model: nn.Module | None = None) -> list[LayerState]:
    """The skip states of all models (None) or of one, of each layer those that were used last.

    A layer that was compiled several times, under other options say, has others as well, which are not in use.
    """
    return [state for binding in bindings_in_use(model) for state in binding.all_states()]


def bindings_in_use(model: nn.Module | None = None) -> list[Binding]:
    """The bindings that some layer of a model (None: of all) was used with last, in the order of their last calls."""
    latest: dict[int, Binding] = {}
    ordered = sorted(bindings(model), key=lambda binding: binding.last_call)
    for binding in ordered:
        latest |= dict.fromkeys(binding.weights(), binding)
    return [binding for binding in ordered if any(found is binding for found in latest.values())]


_version = operator.attrgetter("_version")


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to, as far as it can be known."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # tensors made under inference mode have none
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    # A tensor made under inference mode could not be mutated outside of it.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)
