"""Targets for whole generations, and how far these are from dense ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .generations import Generations
from .journal import Journal
from .quality import psnr, read_output, ssim, value_range
from .replay import Replay

DECIBELS = 20 * math.log10(2)
"""By which PSNR falls where errors double."""
BELOW_THE_MEAN = (7.74, 3.38, 2.69, 2.47, 2.34, 2.26, 2.19, 2.15, 2.11, 2.08, 2.05)
"""Standard deviations, rounded up, for 2, 3, ... values (more count as the last): the larger of the one-sided limits of
a normal distribution for one more value (95 %; Student's t) and for 95 % of it (with a confidence of 75 %)."""


Dense = tuple[Tensor, float]
"""What a dense generation gave, and the width of its range of values."""


@dataclass(frozen=True)
class QualityTarget:
    """What was asked for."""

    name: str
    value: float
    given_range: tuple[float, float] | None

    def read_dense(self, result: Any) -> Dense:
        """A copy, as `run` may write its next result in place; raises for what nothing can be compared with."""
        output = read_output(result).clone()
        if not output.isfinite().all():
            raise ValueError("run() returned values that are not finite, with dense attention; nothing can be compared")
        dense = output, value_range(result, output, self.given_range)
        self.measure(result, dense)
        return dense

    def measure(self, result: Any, dense: Dense) -> float:
        """dB, or SSIM."""
        expected, width = dense
        found = read_output(result)
        if found.shape != expected.shape:
            raise ValueError(f"run() returned {tuple(found.shape)} now and {tuple(expected.shape)} before")
        return (psnr if self.name == "psnr" else ssim)(found, expected, width)

    def bound(self, values: Sequence[float]) -> float:
        """What these generations are not below, nor others (`lower_bound_of_others`)."""
        finite = [value for value in values if math.isfinite(value)]
        return min(*values, lower_bound_of_others(finite)) if len(finite) > 1 else min(values)

    def room(self, bound: float) -> float:
        """By how many times (log2) errors may grow until a bound comes down to the target."""
        if self.name == "psnr":
            return (bound - self.value) / DECIBELS
        if bound >= 1 or self.value >= 1:
            return math.inf if bound >= 1 else -math.inf
        return (math.log2(1 - self.value) - math.log2(1 - bound)) / 2  # quadratic in the error

    def first_error(self, usual: float) -> float:
        """The budget to begin with: half the root mean square error that a PSNR stands for, not too far from `usual`.

        Half, because 95 % of all prompts are to reach what the mean exceeds by some decibels.
        """
        if self.name != "psnr":
            return usual
        return max(usual / 8, min(2 * usual, 10 ** (-self.value / 20) / 2))


def lower_bound_of_others(values: Sequence[float]) -> float:
    """What one more value exceeds in 95 % of the cases, given two or more of a normal distribution.

    And, in 75 % of the cases, 95 % of all values.
    """
    factor = BELOW_THE_MEAN[min(len(values) - 2, len(BELOW_THE_MEAN) - 1)]
    return statistics.mean(values) - factor * statistics.stdev(values)


def calibration_prompt(number: int) -> str:
    """What tells a prompt from others in the journal."""
    return f"calibration prompt {number}"


class QualityRuns:
    """Generations under thresholds against dense ones of the same prompts."""

    def __init__(
        self, target: QualityTarget, generations: Generations, thresholds: Callable[[float], Any], journal: Journal,
        dense: dict[str, Dense],
    ) -> None:  # fmt: skip
        """`thresholds(log2 of the scale)` are those to measure; `dense`: by name of the prompt, what is known."""
        self._target, self._generations = target, generations
        self._thresholds, self._journal, self._dense = thresholds, journal, dense
        self.runs = 0
        """Generations of calibration prompts but the first dense one of each; those of an earlier attempt included."""

    def evaluate(self, prompts: Sequence[Any], x: float, order: Sequence[int], whole: bool) -> dict[int, float]:
        """Quality by number of the prompt, in that order, unless `whole` up to the first that misses the target."""
        values: dict[int, float] = {}
        for number in order:
            name = calibration_prompt(number)
            measure = partial(self.measure, prompts[number], name, x)
            values[number] = self._journal.once(f"scale 2**{x!r}, {name}", measure)
            self.runs += 1
            if values[number] < self._target.value and not whole:
                break
        return values

    def measure(self, prompt: Any, name: str, x: float) -> float:
        """Quality of one generation at a scale; `name` tells the prompt from others."""
        dense = self.dense(prompt, name)
        replay = Replay(self._thresholds(x))
        return self._target.measure(self._generations.observe(prompt, replay), dense)

    def dense(self, prompt: Any, name: str) -> Dense:
        """That of the prompt."""
        if name not in self._dense:
            self._dense[name] = self._target.read_dense(self._generations.observe(prompt, Replay(None)))
        return self._dense[name]

    def check_repeatable(self, prompt: Any) -> None:
        """Raise `ValueError` if two dense generations of the first prompt differ."""
        name = calibration_prompt(0)

        def agreement() -> float:
            dense = self.dense(prompt, name)
            return self._target.measure(self._generations.observe(prompt, Replay(None)), dense)

        value = self._journal.once("agreement", agreement)
        self.runs += 1
        enough = max(60.0, self._target.value + 20) if self._target.name == "psnr" else (3 + self._target.value) / 4
        if value < enough:
            raise ValueError(
                f"two dense generations of run() differ: {self._target.name} {value:.4g} between them. To compare "
                "sparse with dense ones, run() has to give the same each time: fix its seed, for example with "
                "generator=torch.Generator(device).manual_seed(0) made anew inside of run()"
            )
