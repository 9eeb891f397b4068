"""Find by how much an error budget may be scaled. A look at a scale costs a generation per prompt: few have to do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..progress import progress
from .target import QualityTarget

EVALUATIONS = 4
"""Scales that are tried."""
MOST = 8
"""Likewise, as long as none that meets the target is within `COARSE` of what may be reached."""
NEAR, COARSE, FAR = 0.25, 1.0, 8.0
"""Log2 units of scale: what is not worth another evaluation, what is only worth `EVALUATIONS`, and the longest move."""
FLATTEST, STEEPEST = 0.25, 4.0
"""By how many times (log2) errors are believed to grow where the scale doubles."""

Evaluate = Callable[[float, Sequence[int], bool], dict[int, float]]
"""Of log2 of the scale, the numbers of the prompts in order, and whether to go on after one that misses the target: the
quality of the prompts' generations by number."""


@dataclass(frozen=True)
class Trial:
    """What was seen at one scale."""

    scale: float
    """log2."""
    values: dict[int, float]
    """Quality by the prompt's number; of a trial that was ended early, not of all prompts."""
    met: bool


class ScaleSearch:
    """Finds the largest scale of the budget under which the generations of all prompts meet the target.

    From a trial to the next one predicts: what the mean of the prompts has to be, given how far their bound has been
    below it so far, and at which scale it is that, on the line through two trials. The mean is steadier than the
    bound, whose spread is one of few prompts. What meets the target is decided by each trial's own bound.
    """

    def __init__(
        self, target: QualityTarget, prompts: int, evaluate: Evaluate, same: Callable[[float, float], bool]
    ) -> None:
        """`same(a, b)`: whether two scales stand for the same thresholds."""
        self._target, self._prompts, self._evaluate, self._same = target, prompts, evaluate, same
        self.trials: list[Trial] = []

    def find(self) -> Trial:
        """The boldest of the trials that meet the target.

        Raises:
            ValueError: none does.
        """
        x = 0.0
        for _ in progress(range(MOST), f"scales for {self._target.name}"):
            self.trials.append(self._try(x))
            x = self._next()
            if self._is_enough(x):
                break
        best = self._best()
        if best is None:
            values = min(self.trials, key=lambda trial: trial.scale).values.values()
            raise ValueError(
                f"target_{self._target.name} is {self._target.value:g}: no thresholds that were tried meet it on the "
                f"calibration prompts (the most careful ones gave {min(values):.4g}). Allowed: what rounding leaves "
                "room for; ask for less, or calibrate with more prompts, whose spread counts as well"
            )
        return best

    def _try(self, x: float) -> Trial:
        """The first trial shows how prompts differ; later ones begin with the worst, and end where one misses."""
        whole = [trial.values for trial in self.trials if len(trial.values) == self._prompts]
        order = sorted(whole[-1], key=whole[-1].__getitem__) if whole else list(range(self._prompts))
        values = self._evaluate(x, order, not whole)
        met = len(values) == self._prompts and self._target.bound(list(values.values())) >= self._target.value
        return Trial(x, values, met)

    def _best(self) -> Trial | None:
        return max((trial for trial in self.trials if trial.met), key=lambda trial: trial.scale, default=None)

    def _missed(self, best: Trial | None) -> float:
        """The most careful scale that misses the target and is bolder than `best`."""
        over = -math.inf if best is None else best.scale
        return min((trial.scale for trial in self.trials if not trial.met and trial.scale > over), default=math.inf)

    def _is_enough(self, x: float) -> bool:
        if any(self._same(x, trial.scale) for trial in self.trials):
            return True  # nothing bolder, or more careful, is left
        best = self._best()
        if best is None:
            return False
        left = min(self._room(self._bound(best)), self._missed(best) - best.scale)
        return min(left, x - best.scale) < NEAR or (len(self.trials) >= EVALUATIONS and left < COARSE)

    def _next(self) -> float:
        """log2 of the scale to try next: where the bound is expected a little above the target, within what is known.

        May be below the best: then nothing bolder is expected to do.
        """
        x = crossing([(trial.scale, room) for trial, room in self._expected()], NEAR / 2)
        best = self._best()
        missed = self._missed(best)
        if best is None:
            tried = len(self.trials)
            # Where predictions have failed to lead to the target, longer and longer moves.
            least = NEAR if tried < EVALUATIONS else COARSE * 2 ** (tried - EVALUATIONS)
            return max(missed - FAR, min(missed - least, x))
        if math.isinf(missed):
            # On a plateau an older trial may predict no more than what has been tried.
            steepest = best.scale + (self._room(self._bound(best)) - NEAR / 2) / STEEPEST
            return min(best.scale + FAR, max(steepest, x))
        margin = (missed - best.scale) / 4
        return min(missed - margin, max(best.scale + margin, x))

    def _expected(self) -> list[tuple[Trial, float]]:
        """Per trial: the room that its bound leaves if prompts spread as in the mean of the trials.

        Until one meets the target, as in the one where they spread most: thresholds that are too careful cost less than
        none.
        """
        rooms = [{n: self._room(value) for n, value in trial.values.items()} for trial in self.trials]
        whole = [i for i, values in enumerate(rooms) if len(values) == self._prompts]
        below = [statistics.mean(rooms[i].values()) - self._room(self._bound(self.trials[i])) for i in whole]
        spread = max(below) if self._best() is None else statistics.mean(below)
        expected = []
        for trial, values in zip(self.trials, rooms, strict=True):
            # What is missing of a trial that was ended early moved as the rest did.
            like = rooms[min(whole, key=lambda i: abs(self.trials[i].scale - trial.scale))]
            moved = statistics.mean(values[n] - like[n] for n in values)
            expected.append((trial, statistics.mean(like.values()) + moved - spread))
        return expected

    def _bound(self, trial: Trial) -> float:
        return self._target.bound(list(trial.values.values()))

    def _room(self, value: float) -> float:
        return max(-FAR, min(FAR, self._target.room(value)))


def crossing(points: Sequence[tuple[float, float]], aim: float) -> float:
    """Where falling y is `aim`: on a line through the (x, y) nearest to it and the nearest beyond it, else another one.

    A single point says where y would be if it fell by 1 per unit. The line is as flat and as steep as is believed.
    """
    x, y = min(points, key=lambda point: abs(point[1] - aim))
    others = sorted((point for point in points if point[0] != x), key=lambda point: abs(point[1] - aim))
    beyond = [point for point in others if (point[1] > aim) != (y > aim)]
    slope = 1.0
    if others:
        other_x, other_y = (beyond or others)[0]
        slope = max(FLATTEST, min(STEEPEST, (y - other_y) / (other_x - x)))
    return x + (y - aim) / slope
