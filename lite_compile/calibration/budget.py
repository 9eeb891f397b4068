"""Which error a layer may make at which point of the trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Share = Callable[[float], float]


def default_share(fraction: float) -> float:
    """The step's share of `target_error`: 0.25 at the first step, rising with the root of the noise that is gone to 1.

    An error of an early step is carried through all later ones, one of the last step through none. The root is there
    because schedules with a strong shift take half of their steps before a tenth of the noise is gone.
    """
    return 0.25 + 0.75 * math.sqrt(fraction)


@dataclass(frozen=True)
class Budget:
    """The error that each layer may make at each step.

    Attributes:
        target: largest error, in units of the metric.
        metric: one of `attention_error.METRICS`.
        share: of a fraction of the trajectory, 0 to 1: the share of `target` that counts there, above 0, at most 1.
    """

    target: float
    metric: str
    share: Share = default_share

    def at(self, fraction: float) -> float:
        """The largest error at a fraction of the trajectory."""
        share = self.share(fraction)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"share({fraction:g}) is {share!r}; allowed: a number above 0, at most 1")
        return self.target * share
