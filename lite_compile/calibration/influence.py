"""How much an error of a layer's attention weighs in the result of a generation.

Equal errors of two layers may harm the result very differently. If errors of different layers add up like independent
ones, then of all ways to reach a quality of the result the sparsest does nearly the same harm in each layer: density
falls with the logarithm of the error at much the same rate everywhere. So shares of the budget go with 1 / influence.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..progress import progress
from ..schedule import LayerThresholds, Schedule
from .budget import Budget
from .generations import Generations
from .journal import Journal
from .quality import psnr, read_output
from .replay import Replay
from .search import FLOOR
from .target import DenseResults

GROUPS = 8
"""Groups of consecutive layers that are measured; one generation each."""
TRIED = -3.0
"""Threshold of the layers that err, log2 units."""
LEAST = 1 / 16
"""Smallest share of the budget of a layer."""
REPEATABLE = 25.0
"""dB between two generations with nothing skipped, below which nothing can be learned from their results."""


class InfluenceSearch:
    """Lets group after group of layers skip in a generation, all other layers dense, and looks at the result."""

    def __init__(self, budget: Budget, generations: Generations, dense: DenseResults, journal: Journal) -> None:
        self._budget, self._generations, self._dense, self._journal = budget, generations, dense, journal
        self.runs = 0
        """Generations, those of an earlier attempt included."""

    def shares(self, layers: Sequence[str], prompt: Any, name: str) -> dict[str, float]:
        """The share of the budget that each layer may use: 1 for the quarter that weighs least, less for others.

        Args:
            layers: those that may skip, in the order in which they run.
            prompt, name: what is generated, and how `DenseResults` calls it.
        """
        groups = split(layers, GROUPS)
        if len(groups) < 2:
            return {}
        noise = self._measure(prompt, name, (), "noise")["harm"]
        if noise > 10 ** (-REPEATABLE / 10):
            warnings.warn(
                "two generations with nothing skipped differ so much that the influence of layers cannot be measured; "
                "all count alike", stacklevel=6,
            )  # fmt: skip
            return {}
        found = {}
        for number, group in enumerate(progress(groups, "influence of layers")):
            measured = self._measure(prompt, name, group, str(number))
            harm = max(measured["harm"] - noise, noise / 4)
            if measured["error"] > 0 and 0 < harm < math.inf:
                found[group] = math.sqrt(harm) / measured["error"]
        return shares_of(found)

    def _measure(self, prompt: Any, name: str, group: tuple[str, ...], what: str) -> dict[str, float]:
        """Squared distance of the result from the dense one, in units of its range, and the error of the layers."""
        self.runs += 1
        return dict(self._journal.once(f"influence, {what}", lambda: self._run(prompt, name, group)))

    def _run(self, prompt: Any, name: str, group: tuple[str, ...]) -> dict[str, float]:
        expected, width = self._dense.of(prompt, name)
        tried = tuple((_literal(layer), Schedule.constant(TRIED)) for layer in group)
        replay = Replay(LayerThresholds(tried, Schedule.constant(FLOOR)), self._budget.metric, frozenset(group))
        found = read_output(self._generations.observe(prompt, replay))
        errors = [e / self._budget.share_at(f) for layer in group for f, e in replay.errors.get(layer, {}).items()]
        return {
            "harm": 10 ** (-psnr(found, expected, width) / 10),
            "error": statistics.mean(errors) if errors else 0.0,
        }


def split(layers: Sequence[str], groups: int) -> list[tuple[str, ...]]:
    """At most so many groups of consecutive layers, as equal as can be."""
    count = min(groups, len(layers))
    ends = [len(layers) * i // count for i in range(count + 1)] if count else [0]
    return [tuple(layers[a:b]) for a, b in itertools.pairwise(ends)]


def shares_of(influence: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Shares by layer, from the influence of groups of them."""
    if not influence:
        return {}
    ordered = sorted(influence.values())
    reference = ordered[(len(ordered) - 1) // 4]
    return {layer: min(1.0, max(LEAST, reference / weight)) for group, weight in influence.items() for layer in group}


def _literal(name: str) -> str:
    """A glob that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
