"""Scale an error budget until whole generations are as close to dense ones as was asked for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..progress import progress
from .generations import Generations
from .journal import Journal
from .quality import psnr, read_output, ssim, value_range
from .replay import Replay

EVALUATIONS = 5
"""Scales that are tried."""
FIRST_MOVE = 2.0
"""log2 units of scale."""
EXCEEDED_BY_95_PERCENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""Quantiles of Student's t for 1, 2, ... degrees of freedom; more are counted as the last."""


@dataclass(frozen=True)
class QualityTarget:
    """What was asked for."""

    name: str
    value: float
    given_range: tuple[float, float] | None

    def measure(self, result: Any, dense: tuple[Tensor, float]) -> float:
        """dB, or SSIM."""
        expected, width = dense
        found = read_output(result)
        if found.shape != expected.shape:
            raise ValueError(f"run() returned {tuple(found.shape)} now and {tuple(expected.shape)} before")
        return (psnr if self.name == "psnr" else ssim)(found, expected, width)

    def met(self, values: Sequence[float]) -> bool:
        """Whether these generations meet it, and so would 95 % of others if their quality is spread normally."""
        if not all(value >= self.value for value in values):
            return False
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) < 2:
            return True
        return lower_bound_of_another(finite) >= self.value


def lower_bound_of_another(values: Sequence[float]) -> float:
    """What one more value exceeds in 95 % of the cases, given two or more of a normal distribution."""
    quantile = EXCEEDED_BY_95_PERCENT[min(len(values) - 1, len(EXCEEDED_BY_95_PERCENT)) - 1]
    return statistics.mean(values) - quantile * math.sqrt(1 + 1 / len(values)) * statistics.stdev(values)


class ScaleSearch:
    """Finds the largest scale of the budget under which the generations of all prompts meet the target."""

    def __init__(
        self, target: QualityTarget, generations: Generations, thresholds: Callable[[float], Any], journal: Journal
    ) -> None:
        """`thresholds(log2 of the scale)` are those to try."""
        self._target, self._generations = target, generations
        self._thresholds, self._journal = thresholds, journal
        self._dense: dict[str, tuple[Tensor, float]] = {}
        self.runs = 0
        """Generations of calibration prompts, those of an earlier attempt included."""

    def find(self, prompts: Sequence[Any]) -> tuple[float, list[float]]:
        """log2 of the scale, and the quality of each prompt's generation under it.

        Raises:
            ValueError: two dense generations differ, or no scale that was tried meets the target.
        """
        self._check_repeatable(prompts[0])
        self.runs = 1 + len(prompts)
        passed: tuple[float, list[float]] | None = None
        failed: float | None = None
        x, move = 0.0, FIRST_MOVE
        for trial in progress(range(EVALUATIONS), f"scales for {self._target.name}"):
            if passed is not None and self._thresholds(x) == self._thresholds(passed[0]):
                break  # nothing bolder is left
            values = self._evaluate(prompts, x, trial)
            if len(values) == len(prompts) and self._target.met(values):
                passed = (x, values)
            else:
                failed = x
            if passed is None:
                x, move = x - move, move * 2
            elif failed is None:
                x += move
            else:
                x = (passed[0] + failed) / 2
        if passed is None:
            raise ValueError(
                f"target_{self._target.name} is {self._target.value:g}: no thresholds that were tried meet it on the "
                f"calibration prompts (the most careful ones gave {min(values):.4g}). Allowed: what rounding leaves "
                "room for; ask for less, or calibrate with more prompts, whose spread counts as well"
            )
        return passed

    def _evaluate(self, prompts: Sequence[Any], x: float, trial: int) -> list[float]:
        """Quality per prompt, up to the first that fails."""
        values: list[float] = []
        for number, prompt in enumerate(prompts):
            name = f"calibration prompt {number}"
            values.append(self._journal.once(f"scale {trial}, {name}", partial(self.measure, prompt, name, x)))
            self.runs += 1
            if values[-1] < self._target.value:
                break
        return values

    def measure(self, prompt: Any, name: str, x: float) -> float:
        """Quality of one generation at a scale; `name` tells the prompt from others."""
        dense = self.dense(prompt, name)
        replay = Replay(self._thresholds(x))
        return self._target.measure(self._generations.observe(prompt, replay), dense)

    def dense(self, prompt: Any, name: str) -> tuple[Tensor, float]:
        """A dense generation of the prompt, and the width of its range of values."""
        if name not in self._dense:
            result = self._generations.observe(prompt, Replay(None))
            output = read_output(result)
            self._dense[name] = (output, value_range(result, output, self._target.given_range))
        return self._dense[name]

    def _check_repeatable(self, prompt: Any) -> None:
        name = "calibration prompt 0"

        def agreement() -> float:
            dense = self.dense(prompt, name)
            return self._target.measure(self._generations.observe(prompt, Replay(None)), dense)

        value = self._journal.once("agreement", agreement)
        enough = max(60.0, self._target.value + 20) if self._target.name == "psnr" else (3 + self._target.value) / 4
        if value < enough:
            raise ValueError(
                f"two dense generations of run() differ: {self._target.name} {value:.4g} between them. To compare "
                "sparse with dense ones, run() has to give the same each time: fix its seed, for example with "
                "generator=torch.Generator(device).manual_seed(0) made anew inside of run()"
            )
