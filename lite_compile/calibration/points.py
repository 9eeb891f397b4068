"""Numbers by layer and fraction of the trajectory: thresholds, errors, densities."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

Points = dict[str, dict[float, float]]
"""By layer, a number per fraction of the trajectory."""


def strictest(runs: Sequence[Points]) -> Points:
    """The most careful threshold of several generations at each fraction that any of them has."""
    combined: Points = {}
    for layer in dict.fromkeys(layer for run in runs for layer in run):
        known = [run[layer] for run in runs if run.get(layer)]
        fractions = sorted({fraction for points in known for fraction in points})
        combined[layer] = {f: min(interpolate(points, f) for points in known) for f in fractions}
    return combined


def interpolate(points: Mapping[float, float], fraction: float) -> float:
    """Straight between two points; beyond the ends the nearest one counts."""
    fractions = sorted(points)
    if fraction <= fractions[0] or len(fractions) == 1:
        return points[fractions[0]]
    if fraction >= fractions[-1]:
        return points[fractions[-1]]
    for a, b in itertools.pairwise(fractions):
        if a <= fraction <= b:
            weight = (fraction - a) / (b - a)
            return points[a] * (1 - weight) + points[b] * weight
    raise AssertionError("not reached: fractions are sorted")
