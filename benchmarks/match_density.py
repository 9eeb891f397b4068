"""The parameter of a method at which it has a given density, found with few generations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class HasDensity(Protocol):
    """What a generation leaves behind."""

    density: float


Result = TypeVar("Result", bound=HasDensity)


class DensityCurve(Generic[Result]):
    """Density of a method against a number below 0, with which it falls; what was measured serves all later searches.

    Args:
        measure: makes videos with such a number.
        lowest: number at which density is taken to be 1.
        highest: number at which it is taken to be 0.
        first: where the first search begins.
    """

    def __init__(self, measure: Callable[[float], Result], lowest: float, highest: float, first: float) -> None:
        self._measure, self._first = measure, first
        self._known: dict[float, Result] = {}
        self._assumed = {lowest: 1.0, highest: 0.0}

    def find(self, density: float, tolerance: float = 0.004, most: int = 7) -> tuple[float, Result]:
        """The number whose density is nearest to `density`, after `most` measurements or within `tolerance`."""
        for _ in range(most):
            if self._known and self._distance(self._nearest(density), density) <= tolerance:
                break
            number = self._next(density) if self._known else self._first
            self._known[number] = self._measure(number)
        number = self._nearest(density)
        return number, self._known[number]

    def _distance(self, number: float, density: float) -> float:
        return abs(self._known[number].density - density)

    def _nearest(self, density: float) -> float:
        return min(self._known, key=lambda number: self._distance(number, density))

    def _next(self, density: float) -> float:
        """Between the nearest numbers on both sides, on a scale of factors: where a line says, or in the middle."""
        curve = self._assumed | {number: result.density for number, result in self._known.items()}
        below = max((n for n, value in curve.items() if value > density), default=min(curve))
        above = min((n for n, value in curve.items() if n > below), default=max(curve))
        share = 0.5
        if below in self._known and above in self._known:
            line = (curve[below] - density) / (curve[below] - curve[above])
            share = min(max(line, 0.1), 0.9)
        return -math.exp((1 - share) * math.log(-below) + share * math.log(-above))
