"""Which error a layer may make at which step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .points import interpolate

Share = Callable[[float], float]


def default_share(position: float) -> float:
    """The step's share of `target_error`: 0.05 at the first step, rising straight to 1 at the last.

    An error of an early step is carried through all later ones, one of the last step through none. Positions count
    steps rather than noise, since samplers place their steps where the result is decided.
    """
    return 0.05 + 0.95 * position


@dataclass(frozen=True)
class Budget:
    """The error that each layer may make at each step.

    Attributes:
        target: largest error, in units of the metric.
        metric: one of `attention_error.METRICS`.
        share: of a step's position (0: the first, 1: the last): the share of `target` that counts there, above 0, at
            most 1.
        steps: fractions of the trajectory at which the run has its steps, rising. None given: fractions are positions.
    """

    target: float
    metric: str
    share: Share = default_share
    steps: tuple[float, ...] = ()

    def at(self, fraction: float) -> float:
        """The largest error at a fraction of the trajectory."""
        position = fraction
        if len(self.steps) > 1:
            last = len(self.steps) - 1
            position = interpolate({f: i / last for i, f in enumerate(self.steps)}, fraction)
        share = self.share(position)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"share({position:g}) is {share!r}; allowed: a number above 0, at most 1")
        return self.target * share
