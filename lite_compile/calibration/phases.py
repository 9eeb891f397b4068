"""What a calibration does, in order: survey, search, and then replays and repairs, or scales for whole generations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..progress import progress
from ..schedule import Schedule
from .budget import Budget
from .calibration_file import CalibratedThresholds
from .fingerprint import fingerprint
from .generations import Generations
from .journal import Journal
from .points import Points, interpolate, strictest
from .replay import Replay
from .result import Calibration, Quality
from .scale_search import ScaleSearch
from .search import FLOOR, ThresholdSearch
from .survey import Survey
from .target import Dense, QualityRuns, QualityTarget, calibration_prompt
from .write_result import write_result

MARGIN = 0.8
"""Share of the budget that the search aims at: other prompts and seeds err a little more."""
REPAIRS = 2
"""How often thresholds are made more careful where a replay breaks the budget."""
HASTE = 2.0
"""Log2 units that a threshold is lowered by per log2 unit of excess: few repairs have to do, and tiles are few."""
PER_DOUBLING = 0.75
"""Log2 units of threshold that a budget of twice the size is worth: the mean over layers and steps of the moving
digits, between errors of 0.0125 and 0.05 (benchmarks/LOG.md)."""
SEARCHED = 2
"""Prompts that are searched where whole generations decide in the end."""


class Phases:
    """One calibration: searches prompt after prompt, replays, repairs."""

    def __init__(
        self, model: nn.Module, generations: Generations, budget: Budget, prompts: list[Any], journal: Journal
    ) -> None:
        self._model, self._generations, self._budget = model, generations, budget
        self._prompts, self._journal = prompts, journal
        self._attentions, self._calls, self._criterion = 0, 1, "max"

    def carry_out(self, quality: QualityTarget | None, held_out: list[Any], path: Path | None) -> Calibration:
        """All phases, and the file."""
        dense = self._survey(quality)
        reached = None
        if quality is None:
            points, errors, densities = self._repair(self._search(self._prompts))
        else:
            points, reached = self._meet(quality, self._search(self._prompts[:SEARCHED]), held_out, dense)
            errors, densities = self._replay(points, "final")
        thresholds = self._thresholds(points)
        fractions = sorted({f for steps in (*points.values(), *errors.values()) for f in steps} | {0.0, 1.0})
        calibration = Calibration(
            thresholds, self._budget.metric, self._budget.target, self._budget, errors, densities, path,
            self._attentions / (self._calls * len(self._prompts)), reached,
        )  # fmt: skip
        if reached is not None and calibration.density < 1 and min(reached.calibration) == math.inf:
            warnings.warn(
                "what run() returns under these thresholds equals dense generations, though attention was skipped: "
                "does it return what the model made?",
                stacklevel=3,
            )
        if path is not None:
            write_result(calibration, path, fractions, len(self._prompts))
        return replace(calibration, thresholds=replace(thresholds, measured=calibration.step_errors))

    def _survey(self, quality: QualityTarget | None) -> dict[str, Dense]:
        """See in a dense generation of the first prompt where the run has its steps; what it gave, if done now."""
        survey, dense = Survey(), dict[str, Dense]()

        def look() -> dict[str, Any]:
            result = self._generations.observe(self._prompts[0], survey)
            if quality is not None:
                dense[calibration_prompt(0)] = quality.read_dense(result)
            return {"steps": survey.steps, "calls": survey.calls}

        result = self._journal.once("survey", look)
        self._budget = replace(self._budget, steps=tuple(result["steps"]))
        self._calls = result["calls"]
        self._attentions += self._calls
        return dense

    def _search(self, prompts: Sequence[Any]) -> Points:
        """Thresholds that keep the budget in each prompt's generation."""
        found: list[Points] = []
        unused: dict[str, str] = {}
        for number, prompt in enumerate(progress(prompts, "searching thresholds")):
            result = self._journal.once(f"search {number}", partial(self._search_one, prompt, tuple(found)))
            found.append(_from_json(result["points"]))
            self._attentions += result["attentions"]
            self._criterion = next(iter(result["layers"].values()), "max")
            unused.update(result["layers"])
        points = strictest(found)
        if not points:
            raise RuntimeError(
                "run() took no second step that uses masks, so there is nothing to calibrate: one generation needs two "
                "or more denoising steps that are not among dense_steps"
            )
        # What the options keep dense has no thresholds, but is among the layers of the model.
        points |= {layer: {0.0: -math.inf} for layer in unused if layer not in points}
        return points

    def _search_one(self, prompt: Any, before: Sequence[Points]) -> dict[str, Any]:
        limits = strictest(before)
        cap = (
            (lambda layer, fraction: interpolate(limits[layer], fraction) if layer in limits else 0.0)
            if before
            else None
        )
        search = ThresholdSearch(self._budget, MARGIN, cap)
        self._generations.observe(prompt, search)
        return {"points": _to_json(search.found), "layers": search.layers, "attentions": search.kernel_calls}

    def _repair(self, points: Points) -> tuple[Points, Points, Points]:
        """Replay the thresholds; where a layer breaks its budget, make what leads there more careful and try again."""
        for attempt in range(REPAIRS + 1):
            errors, densities = self._replay(points, f"replay {attempt}")
            broken = {layer: self._excess(steps) for layer, steps in errors.items()}
            if attempt == REPAIRS or not any(ratio > 1 for ratio, _ in broken.values()):
                break
            for layer, (ratio, last) in broken.items():
                if ratio > 1:
                    less = min(8.0, HASTE * math.log2(min(ratio / MARGIN, 2.0**16)) + 0.25)
                    points[layer] = {f: max(FLOOR, t - less) if f < last else t for f, t in points[layer].items()}
        return points, errors, densities

    def _excess(self, steps: dict[float, float]) -> tuple[float, float]:
        """Largest ratio of error and budget, and the last fraction where the budget is broken."""
        ratios = {fraction: error / self._budget.at(fraction) for fraction, error in steps.items()}
        return max(ratios.values()), max((f for f, ratio in ratios.items() if ratio > 1), default=0.0)

    def _replay(self, points: Points, name: str) -> tuple[Points, Points]:
        """Errors and densities under these thresholds: the worst, and the mean, over the prompts."""
        errors: Points = {}
        densities: dict[str, dict[float, list[float]]] = {}
        thresholds = self._thresholds(points)
        for number, prompt in enumerate(progress(self._prompts, "measuring errors")):
            result = self._journal.once(f"{name}, {number}", partial(self._replay_one, prompt, thresholds))
            self._attentions += result["attentions"]
            for layer, steps in _from_json(result["errors"]).items():
                known = errors.setdefault(layer, {})
                known.update({f: max(error, known.get(f, 0.0)) for f, error in steps.items()})
            for layer, steps in _from_json(result["densities"]).items():
                for fraction, density in steps.items():
                    densities.setdefault(layer, {}).setdefault(fraction, []).append(density)
        means = {
            layer: {fraction: sum(values) / len(values) for fraction, values in sorted(steps.items())}
            for layer, steps in densities.items()
        }
        return {layer: dict(sorted(steps.items())) for layer, steps in errors.items()}, means

    def _replay_one(self, prompt: Any, thresholds: CalibratedThresholds) -> dict[str, Any]:
        replay = Replay(thresholds, self._budget.metric)
        self._generations.observe(prompt, replay)
        measured = {"errors": _to_json(replay.errors), "densities": _to_json(replay.densities())}
        return {**measured, "attentions": replay.kernel_calls}

    def _meet(
        self, target: QualityTarget, points: Points, held_out: list[Any], dense: dict[str, Dense]
    ) -> tuple[Points, Quality]:
        """Thresholds scaled until generations meet the target, and their quality; `dense`: those that are known."""

        def scaled(x: float) -> Points:
            return {
                layer: {f: t if t < FLOOR else min(0.0, max(FLOOR, t + PER_DOUBLING * x)) for f, t in steps.items()}
                for layer, steps in points.items()
            }

        runs = QualityRuns(target, self._generations, lambda x: self._thresholds(scaled(x)), self._journal, dense)
        runs.check_repeatable(self._prompts[0])
        search = ScaleSearch(
            target, len(self._prompts), partial(runs.evaluate, self._prompts), lambda a, b: scaled(a) == scaled(b)
        )
        best = search.find()
        others = []
        for number, prompt in enumerate(progress(held_out, "held-out prompts")):
            name = f"held-out prompt {number}"
            others.append(self._journal.once(name, partial(runs.measure, prompt, name, best.scale)))
        self._attentions += self._calls * (len(self._prompts) - 1 + runs.runs)
        values = tuple(best.values[number] for number in range(len(self._prompts)))
        return scaled(best.scale), Quality(target.name, target.value, 2.0**best.scale, values, tuple(others))

    def _thresholds(self, points: Points) -> CalibratedThresholds:
        layers = tuple((layer, _schedule(steps)) for layer, steps in points.items())
        return CalibratedThresholds(layers, fingerprint(self._model), self._criterion)


def _schedule(steps: dict[float, float]) -> Schedule:
    """Through these points; the first and the last threshold reach to the ends."""
    ordered = sorted(steps)
    full = {0.0: steps[ordered[0]], **{f: steps[f] for f in ordered}}
    full.setdefault(1.0, steps[ordered[-1]])
    return Schedule(tuple(full), tuple(full.values()), "calibrated")


def _to_json(points: Points) -> dict[str, list[list[float]]]:
    return {layer: [[f, value] for f, value in steps.items()] for layer, steps in points.items()}


def _from_json(content: dict[str, list[list[float]]]) -> Points:
    return {layer: {step[0]: step[1] for step in steps} for layer, steps in content.items()}
