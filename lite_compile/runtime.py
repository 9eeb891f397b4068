"""Run a compiled graph with the state of whichever model it is called for."""

from __future__ import annotations

import hashlib
import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .advance_clock import ClockRules
from .announce import tell_steps
from .clock import RESET
from .clock_source import ClockSource
from .dense_layers import NO_DENSE_LAYERS, DenseLayers, choose_layers
from .find_binding import BindingFinder
from .key_ranges import NO_RANGES, KeyRanges, range_table
from .layer_state import Binding, LayerSpec
from .mask_watch import MaskWatch
from .module_contents import picker
from .options import LayerNames
from .overrides import latest_override
from .passes.graph_inputs import attribute_path, fake_value, is_buffer, is_parameter, placeholders, source_name
from .passes.rewrite_attention import StateInput
from .root_clock import current_call, dense_now, full_names
from .schedule import Thresholds
from .threshold_table import empty_table
from .trajectory import DenseSteps

Size = int | torch.SymInt
_numbers = itertools.count(1)
MAX_REWRITES, MAX_FRESH = 16, 512
"""So many calls in a row without any mask to use are no coincidence; one graph may serve a hundred blocks."""


@lru_cache(maxsize=256)
def _choose_layers(rule: DenseLayers, names: LayerNames, layers: tuple[str, ...]) -> frozenset[str]:
    """Those of a model's layers that skip nothing; excluded ones do not count."""
    return choose_layers(rule, tuple(filter(names.allow, layers))) if rule.any else frozenset()


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

    def _bind(self, size: Size, read: Callable[[Sequence[Any]], int]) -> None:
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if isinstance(expression, sympy.Symbol):
            self._bindings.setdefault(expression, read)

    def read(self, args: Sequence[Any]) -> tuple[int, ...]:
        """What the symbols are in a call with `args`."""
        return tuple([read(args) for read in self._bindings.values()])

    def resolve(self, sizes: Sequence[Sequence[Size]], values: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """`sizes` as integers, where the symbols are `values`."""
        substitution = dict(zip(self._bindings, map(sympy.Integer, values), strict=True))
        return tuple(tuple(_evaluate(size, substitution) for size in group) for group in sizes)


def _read_int(index: int, args: Sequence[Any]) -> int:
    return int(args[index])


def _read_size(index: int, dim: int, args: Sequence[Any]) -> int:
    return int(args[index].shape[dim])


def _evaluate(size: Size, substitution: dict[sympy.Symbol, sympy.Integer]) -> int:
    return size if isinstance(size, int) else int(size.node.expr.xreplace(substitution))


def graph_key(graph: fx.Graph) -> str:
    """Equal for graphs that compute the same: their text with constants and sub-graphs, and their inputs."""
    digest = hashlib.sha256(_text(graph).encode())
    for node in placeholders(graph):
        value = fake_value(node)
        kind = (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else type(value)
        digest.update(f"{node.name} {source_name(node)} {kind}".encode())
    return digest.hexdigest()


def _text(graph: fx.Graph) -> str:
    """The code of a graph, of its sub-graphs (checkpoints, branches), and its tensor constants."""
    parts = [graph.python_code("self").src]
    owner = graph.owning_module
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and owner is not None:
            value = operator.attrgetter(str(node.target))(owner)
            if isinstance(value, fx.GraphModule):
                parts.append(_text(value.graph))
            elif isinstance(value, torch.Tensor):
                parts.append(f"{node.target} {id(value)}")
    return "\n".join(parts)


@dataclass(frozen=True)
class StateInputs:
    """What a rewritten graph expects after the original's inputs: clock, table of thresholds, one state per layer."""

    layers: tuple[StateInput, ...]
    max_streams: int
    device: torch.device
    source: ClockSource | None
    """Who advances the clock; None: the graph itself."""
    clock_words: int
    """Length of the clock; 0 where it is not an input."""
    names: LayerNames
    """Which layers may use their state, if the names that the graph knows are parts of names."""
    thresholds: Thresholds
    dense_steps: DenseSteps
    refresh_every: int = 0
    """Steps between two that mark anew; 0: none does."""
    dense_layers: DenseLayers | frozenset[str] = NO_DENSE_LAYERS
    """Layers that skip nothing: their names or, where these are known late, what they follow from."""
    ranges: KeyRanges = NO_RANGES
    """Ranges of keys; where there are any, their table follows that of the thresholds."""
    history: bool = False
    """Whether one density history per layer follows the states."""
    probe: bool = False
    """Whether one history of what was dropped per layer follows them."""
    masks: tuple[fx.Node, ...] = ()
    """Inputs that the masks of the layers are made from, if nothing tells that they stay as they are."""
    criterion: str = "max"
    whole: bool = False
    """Whether the graph is all that the compiled function does: no break ends it."""


class StatefulGraph:
    """Callable that Dynamo gets: appends clock, thresholds and skip states of the model at hand to the arguments."""

    def __init__(self, compiled: Callable[..., Any], graph: fx.Graph, state: StateInputs) -> None:
        inputs = placeholders(graph)
        position = {node: index for index, node in enumerate(inputs)}
        self._number, self._whole = next(_numbers), state.whole
        self._compiled = compiled
        # What the text does not show: a mask made under one threshold is not used under another.
        self._key = (
            graph_key(graph),
            state.thresholds,
            *state.dense_steps.key,
            state.refresh_every,
            state.dense_layers,
            state.ranges,
        )
        self._layers = [(layer.layer, layer.tile) for layer in state.layers]
        self._layer_names = tuple(layer.layer for layer in state.layers)
        self._paths = [attribute_path(layer.weight) for layer in state.layers]
        self._max_streams, self._device, self._source = state.max_streams, state.device, state.source
        self._names, self._history, self._probe = state.names, state.history, state.probe
        self._thresholds = state.thresholds
        self._dense_steps = state.dense_steps
        self._clock_rules = ClockRules(state.max_streams, state.device, state.dense_steps, state.refresh_every)
        self._dense_layers, self._ranges = state.dense_layers, state.ranges
        self._no_ranges = range_table(NO_RANGES).to(state.device)
        self._criterion = state.criterion
        self._masks = [position[node] for node in state.masks]
        self._dense = dense_now(state.device)
        self._no_thresholds = empty_table(len(state.layers), state.device)
        # What identifies a model: the weights of its rewritten layers first, then all else that it is made of.
        self._identity = [position[layer.weight] for layer in state.layers]
        owned = [index for index, node in enumerate(inputs) if is_parameter(node) or is_buffer(node)]
        self._identity += [index for index in owned if index not in set(self._identity)]
        self._pick_identity = picker(self._identity)
        self._bindings = BindingFinder(self._key, state.clock_words, state.device)
        self._allowed: dict[tuple[str, ...], bool] = {}
        self._fresh_in_a_row, self._warned = 0, False
        self._resolver = SizeResolver(inputs)
        self._sizes = [(*layer.shape, layer.q_len, layer.k_len) for layer in state.layers]
        self._lengths: dict[tuple[LayerSpec, ...], list[tuple[str, int]]] = {}
        self._specs: dict[tuple[int, ...], tuple[LayerSpec, ...]] = {}
        self._only_specs: tuple[LayerSpec, ...] = ()
        """Those of all calls, where no size is symbolic and there was a call."""

    def __call__(self, *args: Any) -> Any:
        binding = self._bindings.find(self._pick_identity(args))
        if binding.calls == 1 or binding.rewrites or self._fresh_in_a_row:
            self._warn_if_nothing_lasts(binding)
        with binding.lock:
            clock = self._follow_root(binding, args) if self._source is ClockSource.ROOT else self._own_clock(binding)
            table = binding.thresholds.table
            specs = self._only_specs or self._resolve(args)
            states = binding.states(specs, self._history, self._probe)
            if table is None:
                table = self._no_thresholds
            if self._ranges.any:
                return self._compiled(*args, clock, table, self._range_table(binding, specs), *states)
            return self._compiled(*args, clock, table, *states)

    def _own_clock(self, binding: Binding) -> Tensor:
        """The clock that the graph advances or, if the user drives it, reads."""
        number = latest_override()
        changed = self._follow_ranges(binding, number) | self._follow_thresholds(binding, number)
        if self._source is ClockSource.ANNOUNCED:
            if changed:
                binding.void()
            binding.listen()
        elif changed:
            with torch.inference_mode(False), torch.no_grad():
                binding.clock[RESET].fill_(1)
        if self._source is None and self._dense_steps.count_last:
            self._tell_steps(binding, binding.clock)
        return binding.clock

    def _follow_thresholds(self, binding: Binding, number: int, layers: tuple[str, ...] = ()) -> bool:
        """Write the table if it is out of date; `layers` of the whole model, where the graph is a part of it."""
        binding.thresholds.criterion = self._criterion
        rule, names = self._dense_layers, binding.names or self._layer_names
        exact = rule if isinstance(rule, frozenset) else _choose_layers(rule, self._names, layers)
        return binding.thresholds.update(self._thresholds, names, binding.ids, number, exact)

    def _follow_ranges(self, binding: Binding, number: int) -> bool:
        if not self._ranges.any:
            return False
        binding.default_ranges = self._ranges
        return binding.ranges.update(self._ranges, binding.ids, number)

    def _range_table(self, binding: Binding, specs: tuple[LayerSpec, ...]) -> Tensor:
        """The table of the ranges, none for layers that the options exclude."""
        table = binding.ranges.table
        if table is None or not self._allows(binding.names):
            return self._no_ranges
        binding.ranges.check(self._lengths[specs])
        return table

    def _tell_steps(self, binding: Binding, clock: Tensor) -> None:
        anchor = binding.ids()[0]
        if anchor is not None:
            tell_steps(anchor, clock)

    def _follow_root(self, binding: Binding, args: Sequence[Any]) -> Tensor:
        """Where the running call of the root stands, int32 `[NOW_WORDS]`; no state may be used if there is none."""
        call = current_call()
        if self._ranges.any and self._follow_ranges(binding, latest_override() if call is None else call.override):
            binding.void()
        if call is None or not call.root.follow(self._number, self._whole, binding):
            return self._dense
        root = call.clock(self._clock_rules)
        if binding.clock is not root.clock:
            layers = [layer for layer, _ in self._layers]
            binding.move_to(root.clock, full_names(call.module, layers, self._paths, binding.ids()))
            call.root.add_layers(call.module, binding.names)
            if not binding.names:
                warnings.warn(
                    f"liteattention: {type(call.module).__name__} calls a block that is not one of its submodules, "
                    "whose attention stays dense: its prompt and weights are out of sight. Register its model.",
                    stacklevel=4,
                )
        if not binding.names:  # a block of another model, whose prompt and weights the clock of this root does not see
            return self._dense
        # The root's hooks have reset the clock if something was set, but not if a model with an override is gone, or if
        # a layer that ran for the first time shows that this one is not the last.
        wanted = self._names, call.override, call.root.layers
        if wanted != binding.followed:
            if self._follow_thresholds(binding, call.override, call.root.layers):
                binding.void()
            binding.followed = wanted
        # A block that runs twice in one call of the root (shared, or for guidance) has one state, for the first time.
        if binding.served == call.number or not self._allows(binding.names):
            return self._dense
        binding.served = call.number
        if self._dense_steps.count_last:
            self._tell_steps(binding, root.clock)
        now = root.read(call)
        if not self._masks:
            return now
        given = root.identify([args[index] for index in self._masks])
        binding.mask_watch = binding.mask_watch or MaskWatch(now, self._max_streams, len(given))
        return binding.mask_watch.follow(now, given)

    def _allows(self, names: tuple[str, ...]) -> bool:
        """Whether the options allow that these layers are rewritten."""
        if names not in self._allowed:
            self._allowed[names] = all(map(self._names.allow, names))
        return self._allowed[names]

    def _warn_if_nothing_lasts(self, binding: Binding) -> None:
        self._fresh_in_a_row = self._fresh_in_a_row + 1 if binding.calls == 1 else 0
        if not self._warned and (binding.rewrites >= MAX_REWRITES or self._fresh_in_a_row >= MAX_FRESH):
            self._warned = True
            warnings.warn(
                "liteattention: parameters or buffers of the model are replaced or written to at each call, so that no "
                "skip mask lasts and attention stays dense. Keep what changes per call out of its buffers, and offload "
                "whole models rather than single layers.",
                stacklevel=3,
            )

    def _resolve(self, args: Sequence[Any]) -> tuple[LayerSpec, ...]:
        values = self._resolver.read(args)
        specs = self._specs.get(values)
        if specs is None:
            resolved = self._resolver.resolve(self._sizes, values)
            specs = tuple(
                LayerSpec(layer, tuple(shape), tile, q_len, k_len)
                for (layer, tile), (*shape, q_len, k_len) in zip(self._layers, resolved, strict=True)
            )
            self._lengths[specs] = [(spec.layer, spec.k_len) for spec in specs]
            self._specs[values] = specs  # last: a thread that calls the graph for another model may find it at once
            if not values:
                self._only_specs = specs
        return specs
