"""`set_threshold` and `set_ranges`: values that take the place of an option's, for one model, compiling nothing anew.

Setting only notes what is wanted. Each graph compares a number at the beginning of a call and writes its tables when
there is something new for its model, so that no call sees a table change.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dense_layers import ExactLayers
from .errors import OptionValueError
from .key_ranges import NO_RANGES, KeyRanges, check_disjoint, range_table
from .schedule import Thresholds
from .threshold_table import threshold_table


@dataclass(frozen=True)
class Override:
    """What was set for a model."""

    number: int
    """Counts the overrides of all models."""
    thresholds: Thresholds | None = None
    ranges: KeyRanges = NO_RANGES
    """Those of its kinds that are None were not set."""


_overrides: weakref.WeakKeyDictionary[nn.Module, Override] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_latest = 0


def override(model: nn.Module, thresholds: Thresholds | None = None, ranges: KeyRanges = NO_RANGES) -> None:
    """Let `model` follow these from its next call on; what is None stays as it is."""
    global _latest
    with _lock:
        before = _overrides.get(model, Override(0))
        thresholds = before.thresholds if thresholds is None else thresholds
        kinds = [old if new is None else new for old, new in zip(before.ranges, ranges, strict=True)]
        _overrides[model] = Override(_latest + 1, thresholds, KeyRanges(*kinds))
        _latest += 1


def latest_override() -> int:
    """Number of the last override of any model; 0 if there was none."""
    return _latest


def overrides_of(tensors: Iterable[int | None]) -> Iterator[Override]:
    """The overrides of all models that have each of these parameters and buffers (by id), the latest first."""
    wanted = set(tensors)
    for owned, found in _owners():
        if wanted <= owned:
            yield found


def touching_override(tensors: Iterable[Tensor]) -> int:
    """Number of the latest override of a model that has any of these parameters and buffers; 0 if there is none."""
    wanted = {id(tensor) for tensor in tensors}
    return next((found.number for owned, found in _owners() if wanted & owned), 0)


def _owners() -> Iterator[tuple[set[int], Override]]:
    """What each model with an override consists of, the latest override first."""
    with _lock:
        found = sorted(_overrides.items(), key=lambda item: -item[1].number)
    for model, value in found:
        yield {id(tensor) for tensor in (*model.parameters(), *model.buffers())}, value


class ThresholdsInForce:
    """The thresholds of the layers of one graph for one model, as the graph reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._number = -1
        self._thresholds: Thresholds | None = None
        self.exact: frozenset[str] = frozenset()
        """Layers that skip nothing, whatever the threshold."""
        self.layers: tuple[str, ...] = ()
        self.criterion = "max"
        """The option of that name."""
        self.table: Tensor | None = None
        """float32 `[layers, COLUMNS]`; its address stays as it is."""

    @property
    def thresholds(self) -> Thresholds | None:
        """Those that the last call followed, which read `layers`; None before the first."""
        return self._thresholds

    def update(
        self, default: Thresholds, layers: tuple[str, ...], tensors: Callable[[], Iterable[int | None]], number: int,
        exact: frozenset[str] = frozenset(),
    ) -> bool:  # fmt: skip
        """Write the table if it is not what a call should see; whether masks made under other thresholds may exist.

        Args:
            default: what holds without an override.
            tensors: gives the ids of the parameters and buffers of the graph; asked only if something was set since.
            number: `latest_override()` when the call of the model began; later ones wait for the next call.
            exact: names of layers that skip nothing, whatever the threshold.
        """
        if number == self._number and layers == self.layers and exact == self.exact:
            return False
        found = list(overrides_of(tensors()))
        if found and found[0].number > number:
            return False
        thresholds = next((override.thresholds for override in found if override.thresholds is not None), default)
        thresholds.check_criterion(self.criterion)
        thresholds = ExactLayers(thresholds, exact) if exact else thresholds
        if (thresholds, layers) == (self._thresholds, self.layers):
            self._number, self.exact = number, exact
            return False
        values = threshold_table(thresholds, layers)
        with torch.inference_mode(False), torch.no_grad():
            if self.table is None:
                self.table = torch.empty_like(values, device=self._device)
            self.table.copy_(values, non_blocking=True)
        changed = self._thresholds is not None
        self._number, self._thresholds, self.exact, self.layers = number, thresholds, exact, layers
        return changed


class RangesInForce:
    """The ranges of keys of one graph for one model, as the graph reads them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._number = -1
        self._ranges: KeyRanges | None = None
        self._checked: Sequence[object] | None = None
        self.table: Tensor | None = None
        """int32, see `key_ranges.range_table`; its address stays as it is."""

    @property
    def ranges(self) -> KeyRanges | None:
        """Those that the last call followed; None before the first."""
        return self._ranges

    def update(self, default: KeyRanges, tensors: Callable[[], Iterable[int | None]], number: int) -> bool:
        """As `ThresholdsInForce.update`. `default` also says which kinds the graph can be told."""
        if number == self._number:
            return False
        found = list(overrides_of(tensors()))
        if found and found[0].number > number and self.table is not None:
            return False
        ranges = combine_ranges(default, [override.ranges for override in found])
        self._number = number
        if ranges == self._ranges:
            return False
        with torch.inference_mode(False), torch.no_grad():
            if self.table is None:
                self.table = torch.empty_like(range_table(ranges), device=self._device)
            self.table.copy_(range_table(ranges), non_blocking=True)
        changed = self._ranges is not None
        self._ranges, self._checked = ranges, None
        return changed

    def check(self, layers: Sequence[tuple[str, int]]) -> None:
        """Raise `OptionValueError` if the ranges do not fit layers of that name and number of keys."""
        if self._ranges is not None and layers is not self._checked:
            check_lengths(self._ranges, layers)
            self._checked = layers


def combine_ranges(default: KeyRanges, found: Sequence[KeyRanges]) -> KeyRanges:
    """The ranges that hold: of each kind the first that was set, or the default. None of a kind that a graph lacks."""
    kinds = []
    for name in KeyRanges._fields:
        compiled = getattr(default, name)
        given = next((value for ranges in found if (value := getattr(ranges, name)) is not None), None)
        if given and compiled is None:
            raise OptionValueError(
                f"{name} is {list(given)} by lite_compile.set_ranges, but the model was compiled without the option "
                f"{name!r}; allowed: [], or a model that was compiled with options={{{name!r}: []}}"
            )
        kinds.append(given if compiled is not None and given is not None else compiled)
    return KeyRanges(*kinds)


def check_lengths(ranges: KeyRanges, layers: Iterable[tuple[str, int]]) -> None:
    """Raise `OptionValueError` if the ranges do not fit layers of that name and number of keys."""
    names = {keys: layer for layer, keys in layers}
    for keys, layer in names.items():
        check_disjoint(ranges, keys, f" in layer {layer!r}, which has {keys} keys")
