"""`set_threshold`: thresholds that take the place of the option's, for one model, without compiling anything anew.

Setting only notes what is wanted. Each graph compares a number at the beginning of a call and writes its table of
thresholds when there is something new for its model, so that no call sees a table change.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dense_layers import ExactLayers
from .schedule import Thresholds, as_thresholds, check_threshold
from .threshold_table import threshold_table


@dataclass(frozen=True)
class Override:
    """What was set for a model."""

    number: int
    """Counts the overrides of all models."""
    thresholds: Thresholds


_overrides: weakref.WeakKeyDictionary[nn.Module, Override] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_latest = 0


def override(model: nn.Module, threshold: Any) -> None:
    """Let `model` follow `threshold` (any value of the option) from its next call on."""
    global _latest
    thresholds = as_thresholds(check_threshold("threshold", threshold))
    with _lock:
        _overrides[model] = Override(_latest + 1, thresholds)
        _latest += 1


def latest_override() -> int:
    """Number of the last override of any model; 0 if there was none."""
    return _latest


def overrides_of(tensors: Iterable[Tensor | None]) -> Iterator[Override]:
    """The overrides of all models that have each of these parameters and buffers, the latest first."""
    wanted = {id(tensor) for tensor in tensors}
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
        self._exact: frozenset[str] = frozenset()
        self.layers: tuple[str, ...] = ()
        self.table: Tensor | None = None
        """float32 `[layers, COLUMNS]`; its address stays as it is."""

    def update(
        self, default: Thresholds, layers: tuple[str, ...], tensors: Callable[[], Iterable[Tensor | None]], number: int,
        exact: frozenset[str] = frozenset(),
    ) -> bool:  # fmt: skip
        """Write the table if it is not what a call should see; whether masks made under other thresholds may exist.

        Args:
            default: what holds without an override.
            tensors: gives the parameters and buffers of the graph; asked only if something was set since.
            number: `latest_override()` when the call of the model began; later ones wait for the next call.
            exact: names of layers that skip nothing, whatever the threshold.
        """
        if number == self._number and layers == self.layers and exact == self._exact:
            return False
        found = next(overrides_of(tensors()), None)
        if found is not None and found.number > number:
            return False
        thresholds = default if found is None else found.thresholds
        thresholds = ExactLayers(thresholds, exact) if exact else thresholds
        if (thresholds, layers) == (self._thresholds, self.layers):
            self._number, self._exact = number, exact
            return False
        values = threshold_table(thresholds, layers)
        with torch.inference_mode(False), torch.no_grad():
            if self.table is None:
                self.table = torch.empty_like(values, device=self._device)
            self.table.copy_(values, non_blocking=True)
        changed = self._thresholds is not None
        self._number, self._thresholds, self._exact, self.layers = number, thresholds, exact, layers
        return changed
