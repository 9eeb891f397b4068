"""Run generations densely or under given thresholds, and measure what that does to each layer at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedule import Thresholds
from ..threshold_table import read_thresholds, threshold_table
from .attention_error import attention_error
from .intercept import AttendCall
from .points import Points


class Replay:
    """Handler for `intercepted`: attention as a model computes it that follows `thresholds`.

    Thresholds are read as compiled graphs read them. Neither the option nor an override of the model is touched.
    """

    def __init__(self, thresholds: Thresholds | None, metric: str | None = None) -> None:
        """`thresholds` None: dense. `metric`: measure the error of each call; costs a dense attention."""
        self._thresholds, self._metric = thresholds, metric
        self._tables: dict[str, Tensor] = {}
        self.errors: Points = {}
        """The worst over guidance streams and batch entries."""
        self._densities: dict[str, dict[float, list[float]]] = {}
        self.kernel_calls = 0
        """How often attention was computed."""

    def __call__(self, layer: str, call: AttendCall) -> None:
        self.kernel_calls += 1
        if self._thresholds is None or not call.uses_state:
            call.attend_densely()
            return
        if layer not in self._tables:
            self._tables[layer] = threshold_table(self._thresholds, (layer,)).to(call.state.device)
        call.attend(read_thresholds(self._tables[layer], call.now))
        self._densities.setdefault(layer, {}).setdefault(call.fraction, []).append(call.density())
        if self._metric is not None:
            error = sparse_error(call, self._metric)
            self.kernel_calls += 1
            errors = self.errors.setdefault(layer, {})
            errors[call.fraction] = max(errors.get(call.fraction, 0.0), error)

    def densities(self) -> Points:
        """Share of the tiles computed, by layer and fraction; mean over streams."""
        return {
            layer: {fraction: sum(values) / len(values) for fraction, values in steps.items()}
            for layer, steps in self._densities.items()
        }


def sparse_error(call: AttendCall, metric: str) -> float:
    """Error of `call.out`, which was computed, against dense attention; waits for the device."""
    lse = None if call.lse is None else call.lse.clone()
    dense = call.attend_densely(torch.empty_like(call.out))
    if call.lse is not None and lse is not None:
        call.lse.copy_(lse)
    return attention_error(call.out, dense, metric)


def mean_density(densities: Points) -> float:
    """Mean over layers and steps."""
    values = [density for steps in densities.values() for density in steps.values()]
    return sum(values) / len(values) if values else 1.0
