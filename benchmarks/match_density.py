"""The parameter of a method at which it has a given density, found with few generations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class HasDensity(Protocol):
    """What a generation leaves behind."""

    density: float


Result = TypeVar("Result", bound=HasDensity)


class DensityCurve(Generic[Result]):
    """Density of a method against its parameter, along which it falls; each measured point serves all later searches.

    Args:
        measure: makes videos with a parameter.
        lowest: parameter at which density is taken to be 1.
        highest: parameter at which it is taken to be 0.
        first: where the first search begins.
    """

    def __init__(self, measure: Callable[[float], Result], lowest: float, highest: float, first: float) -> None:
        self._measure, self._first = measure, first
        self._known: dict[float, Result] = {}
        self._assumed = {lowest: 1.0, highest: 0.0}

    def find(self, density: float, tolerance: float = 0.004, most: int = 7) -> tuple[float, Result]:
        """The parameter whose density is nearest to `density`, after `most` measurements or within `tolerance`."""
        for _ in range(most):
            if self._known and self._distance(self._nearest(density), density) <= tolerance:
                break
            parameter = self._next(density) if self._known else self._first
            if parameter in self._known:
                break
            self._known[parameter] = self._measure(parameter)
        parameter = self._nearest(density)
        return parameter, self._known[parameter]

    def _distance(self, parameter: float, density: float) -> float:
        return abs(self._known[parameter].density - density)

    def _nearest(self, density: float) -> float:
        return min(self._known, key=lambda parameter: self._distance(parameter, density))

    def _next(self, density: float) -> float:
        """Straight between the nearest points on both sides, but not at the very edge: a curve bends."""
        curve = self._assumed | {parameter: result.density for parameter, result in self._known.items()}
        below = max((p for p, value in curve.items() if value > density), default=min(curve))
        above = min((p for p, value in curve.items() if value <= density and p > below), default=max(curve))
        share = (curve[below] - density) / max(curve[below] - curve[above], 1e-9)
        return below + min(max(share, 0.1), 0.9) * (above - below)
