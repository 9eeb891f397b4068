"""The step clock of a model whose blocks are compiled one by one, or whose graph breaks: kept by hooks on the model.

The first compiled block that finds the call of such a model (find_root.py) installs two hooks on that module, the
*root*. From then on each call of the root is known by its frame for as long as it runs, and the clock is advanced once
per such call, by the first block that asks.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .advance_clock import ClockAdvance, ClockRules
from .clock import RESET, clock_words, identify
from .find_root import CALL, ClockArguments, find_root, frames, read_arguments
from .layer_state import Binding, versions
from .module_contents import module_tensors
from .ops import NOW_FRACTION, NOW_SLOT, NOW_WORDS
from .overrides import latest_override, touching_override
from .passes.find_attention import is_made_up
from .root_contents import RootContents
from .trajectory import UNKNOWN

_numbers = itertools.count(1)
_lock = threading.RLock()
_roots: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Root]] = weakref.WeakKeyDictionary()
"""Every module that has had hooks. They own its `Root`, whose running call refers to the module: it goes with it."""


class _Entered(threading.local):
    """The root whose call this thread began last and has not left.

    Not to be trusted: no hook tells the end of a call that an interrupt broke off, nor of the first one, in the middle
    of which the hooks were installed.
    """

    root: weakref.ref[Root] | None = None


_entered = _Entered()


@dataclass(frozen=True)
class RootCall:
    """One call of a root module, while it runs."""

    root: Root
    frame: FrameType
    thread: int
    arguments: ClockArguments
    override: int
    """`latest_override()` when the call began."""
    outer: weakref.ref[Root] | None
    """Whose call the thread was in when this one began."""
    number: int = field(default_factory=lambda: next(_numbers))

    def clock(self, rules: ClockRules) -> RootClock:
        """The root's clock that follows these rules."""
        return self.root.clock(len(self.arguments.conditions), rules)

    @property
    def module(self) -> nn.Module:
        """The root itself."""
        module: nn.Module = self.frame.f_locals["self"]
        return module

    def is_running(self) -> bool:
        """Whether the call has not returned yet, in whatever thread."""
        return any(frame is self.frame for frame in frames(sys._current_frames().get(self.thread)))


class RootClock:
    """A clock outside of the graphs, and where the current call stands by it."""

    def __init__(self, conditions: int, rules: ClockRules) -> None:
        self._advance = ClockAdvance(rules)
        self._call = 0
        self._identified: dict[tuple[int, ...], tuple[list[Any], Tensor]] = {}
        with torch.inference_mode(False):
            words = clock_words(rules.max_streams, conditions)
            self.clock = torch.zeros(words, dtype=torch.int32, device=rules.device)
            self.now = dense_now(rules.device)

    def read(self, call: RootCall) -> Tensor:
        """int32 `[NOW_WORDS]`: where `call` stands. Advances the clock when the call asks for the first time."""
        if call.number != self._call:
            self._call = call.number
            self._identified.clear()
            given = call.arguments
            with torch.inference_mode(False), torch.no_grad():
                latents, conditions = (list(map(_usable, x)) for x in (given.latents, given.conditions))
                now = self._advance(self.clock, latents, _usable(given.timestep), conditions)
                self.now.copy_(now)
        return self.now

    def identify(self, values: Sequence[Any]) -> Tensor:
        """int32 fingerprint of what a block was given, computed once per call for blocks that were given the same."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        key = (*map(id, values), *versions(tensors))
        # Of tensors made under inference mode nobody knows whether they were written to.
        if key not in self._identified or any(tensor.is_inference() for tensor in tensors):
            with torch.inference_mode(False), torch.no_grad():
                fingerprint = identify(list(map(_usable, values)), self.clock.device)
            self._identified[key] = (list(values), fingerprint)  # which keeps the ids from being used again
        return self._identified[key][1]


class Root:
    """What the hooks on one module keep: its clocks, and the call that is running."""

    def __init__(self, module: nn.Module) -> None:
        self._clocks: dict[tuple[Hashable, ...], RootClock] = {}
        self._override = latest_override()
        self.call: RootCall | None = None
        self.layers: tuple[str, ...] = ()
        """Names of the rewritten layers that have run so far, in the order in which the module holds them."""
        self._contents = RootContents(module)
        module.register_forward_pre_hook(_EnterHook(self), with_kwargs=True)
        module.register_forward_hook(_LeaveHook(self), always_call=True)

    def clock(self, conditions: int, rules: ClockRules) -> RootClock:
        """The clock for that many conditioning inputs that follows these rules."""
        key = (conditions, rules.key)
        if key not in self._clocks:
            self._clocks[key] = RootClock(conditions, rules)
        return self._clocks[key]

    def enter(self, module: nn.Module, frame: FrameType, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """A call begins. If another thread is in the middle of one, the new one goes without a clock."""
        with _lock:
            running = self.call
            if running is not None and not running.is_running():
                running = None
            if running is not None and running.thread != threading.get_ident():
                self._contents.doubt()
                return
            found = read_arguments(module, args, kwargs)
            override, before = latest_override(), self._override
            self._override = override
            if isinstance(found, str):
                self.call = None
            else:
                self.call = RootCall(self, frame, threading.get_ident(), found, override, _entered.root)
                _entered.root = weakref.ref(self)
            changed = self._contents.begin(counts=running is None)  # a LoRA, a prompt in a buffer
            if changed or (override != before and touching_override(module_tensors(module)) > before):
                self._void()

    def follow(self, graph: int, whole: bool, binding: Binding) -> bool:
        """A block of the running call runs; whether it may use its masks.

        Args:
            graph: a number that no other graph has.
            whole: whether the graph is all that the compiled function does.
        """
        contents = self._contents
        if not contents.expects(graph, binding) and contents.note(graph, whole, binding):
            self._void()
        return contents.usable

    def _void(self) -> None:
        """Let each clock begin a generation when it is advanced next."""
        for clock in self._clocks.values():
            clock.clock[RESET].fill_(1)

    def add_layers(self, module: nn.Module, names: Sequence[str]) -> None:
        """Let `layers` have these names as well."""
        if set(names) <= set(self.layers):
            return
        places = {name.replace("_orig_mod.", ""): place for place, (name, _) in enumerate(module.named_modules())}

        def place(layer: str) -> int:
            while layer not in places:  # what is made up stands below a module; the root's own name is empty
                layer = layer.rpartition(".")[0]
            return places[layer]

        self.layers = tuple(sorted(dict.fromkeys((*self.layers, *names)), key=place))

    def leave(self, frame: FrameType) -> None:
        """A call is over."""
        with _lock:
            if self.call is not None and self.call.frame is frame:
                _entered.root = self.call.outer
                self.call = None
                if sys.exc_info()[0] is None:
                    self._contents.end()


class _Hook:
    """Keeps the root alive. A copied or unpickled module starts without a clock, and so with hooks that do nothing."""

    def __init__(self, root: Root | None = None) -> None:
        self._root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _EnterHook(_Hook):
    """Pre-hook of a root."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # the module itself is being compiled: its graph has a clock of its own
        root, frame = root_of(module), _calling_frame(module)
        if root is not None and frame is not None:
            root.enter(module, frame, args, kwargs)


class _LeaveHook(_Hook):
    """Forward hook of a root."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        root, frame = root_of(module), _calling_frame(module)
        if root is not None and frame is not None:
            root.leave(frame)


def root_of(module: nn.Module) -> Root | None:
    """What the hooks on `module` keep; None if it has none."""
    reference = _roots.get(module)
    return None if reference is None else reference()


def current_call() -> RootCall | None:
    """The call of a root module that the running code is part of; installs hooks where the first one is found."""
    root = None if _entered.root is None else _entered.root()
    call = None if root is None else root.call
    if call is not None:
        # Begun last: if the running code is part of it, then no call of another root is in between.
        begun, above = call.frame, sys._getframe(1).f_back
        while above is not None:
            if above is begun:
                return call
            above = above.f_back
    for frame in frames(sys._getframe(1)):
        if frame.f_code is CALL:
            root = root_of(frame.f_locals["self"])
            if root is not None and root.call is not None and root.call.frame is frame:
                return root.call
    found = find_root()
    if isinstance(found, str):
        return None
    module, frame, args, kwargs = found
    with _lock:
        if module in _roots:
            return None  # another thread is using it, or its hooks were taken away
        root = Root(module)
        _roots[module] = weakref.ref(root)
        root.enter(module, frame, args, kwargs)  # the hooks missed the beginning of this first call
        return root.call


def full_names(
    module: nn.Module, layers: Sequence[str], paths: Sequence[tuple[str, ...]], weights: Sequence[int | None]
) -> list[str]:
    """Names of layers in `module`, given their names in a part of it; none if it does not hold them.

    Args:
        paths: attributes that lead from that part to each layer's weight.
        weights: ids of the weights, of which `module` knows the full names.
    """
    owned: dict[int | None, str] = {
        id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    held = owned.keys() | {id(buffer) for buffer in module.buffers()}
    if not held.issuperset(weights[: len(layers)]):
        return []
    names = []
    for layer, path, weight in zip(layers, paths, weights, strict=False):
        parts = owned.get(weight, "").replace("_orig_mod.", "").split(".")
        part = parts[: -len(path)] if path and tuple(parts[-len(path) :]) == path else []
        tail = [] if part and is_made_up(layer) and layer != path[0] else [layer]
        names.append(".".join((*part, *tail)))
    return names


def dense_now(device: torch.device) -> Tensor:
    """What `attend` is told where no state may be used."""
    words = [0] * NOW_WORDS
    words[NOW_SLOT] = -1
    words[NOW_FRACTION] = int(torch.tensor(UNKNOWN, dtype=torch.float32, device="cpu").view(torch.int32))
    with torch.inference_mode(False):
        return torch.tensor(words, dtype=torch.int32, device=device)


def _usable(x: Any) -> Any:
    """Tensors made under inference mode cannot be used outside of it as they are."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _calling_frame(module: nn.Module) -> FrameType | None:
    """The frame of the call of `module` whose hook is running."""
    for frame in frames(sys._getframe(1)):
        if frame.f_code is CALL and frame.f_locals["self"] is module:
            return frame
    return None
