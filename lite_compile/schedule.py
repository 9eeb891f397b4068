"""Thresholds that change along the trajectory and from layer to layer: what the option `threshold` may be."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

from torch import nn

from .errors import OptionValueError, wrong_type, wrong_value

NUMBER = "a number <= 0 in log2 units, for example -10.0; -inf skips only what a mask hides"
ALLOWED = (
    f"{NUMBER}; a list of two or more of them, spread over the trajectory; a lite_compile.Schedule; a dict of these "
    "by layer-name globs, with one under '*' for all other layers; or a file of lite_compile.calibrate"
)


class Thresholds(ABC):
    """Which schedule each layer of a model follows. Implementations are immutable, hashable and comparable."""

    @abstractmethod
    def schedule(self, layer: str) -> Schedule:
        """The schedule of the layer of that name; raises `OptionValueError` if there is none for it."""

    def check_layers(self, layers: Sequence[str]) -> None:
        """Raise `OptionValueError` if some of these layers have no schedule."""
        for layer in layers:
            self.schedule(layer)

    def check_criterion(self, criterion: str) -> None:  # noqa: B027
        """Raise `OptionValueError` if these thresholds were found under another `criterion`. Most were under none."""

    def check_model(self, modules: Sequence[nn.Module], layers: Sequence[str]) -> None:  # noqa: B027
        """Raise `OptionValueError` if these are thresholds of another model than one of `modules` (or a part of one).

        `layers`: names that the model is known to have. Most thresholds are of no model.
        """


@dataclass(frozen=True, repr=False)
class Schedule(Thresholds):
    """A threshold along the trajectory, from 0 (the first step) to 1 (no noise is left): straight between its points.

    The fraction is the share of the noise that is gone, so that one schedule serves any number of steps. Made by
    `constant`, `linear`, `cosine` and `points`; thresholds are in log2 units, <= 0.

    Raises:
        OptionValueError, OptionTypeError: a threshold is positive, NaN or no number; the fractions do not rise from 0
            to 1.
    """

    fractions: tuple[float, ...]
    thresholds: tuple[float, ...]
    text: str = field(default="", compare=False)
    """How it was made."""

    def __post_init__(self) -> None:
        for name, value in (("fractions", self.fractions), ("thresholds", self.thresholds)):
            if not isinstance(value, list | tuple):
                raise wrong_type("threshold", value, f"{name} in a tuple")
        fractions = tuple(self.fractions)
        if not all(isinstance(fraction, int | float) and not isinstance(fraction, bool) for fraction in fractions):
            raise wrong_type("threshold", fractions, "fractions from 0 to 1")
        numbers = tuple(check_number("threshold", value) for value in self.thresholds)
        rising = all(a < b for a, b in itertools.pairwise(fractions))
        if not rising or len(fractions) != len(numbers) or (*fractions[:1], *fractions[-1:]) != (0, 1):
            raise wrong_value("threshold", fractions, "as many fractions as thresholds, which rise from 0 to 1")
        object.__setattr__(self, "fractions", tuple(map(float, fractions)))
        object.__setattr__(self, "thresholds", numbers)

    @classmethod
    def constant(cls, threshold: float) -> Schedule:
        """The same threshold all the time."""
        return cls((0.0, 1.0), (threshold, threshold), f"Schedule.constant({threshold!r})")

    @classmethod
    def linear(cls, start: float, end: float) -> Schedule:
        """From `start` straight to `end`."""
        return cls((0.0, 1.0), (start, end), f"Schedule.linear({start!r}, {end!r})")

    @classmethod
    def cosine(cls, start: float, end: float) -> Schedule:
        """From `start` to `end` along half a cosine: slowly at both ends. Both are finite."""
        first, last = (check_number("threshold", value) for value in (start, end))
        if math.isinf(first) or math.isinf(last):
            raise wrong_value("threshold", (start, end), "finite thresholds for a cosine")
        fractions = [i / _COSINE_STEPS for i in range(_COSINE_STEPS + 1)]
        values = [last + (first - last) * (1 + math.cos(math.pi * x)) / 2 for x in fractions]
        return cls(tuple(fractions), (first, *values[1:-1], last), f"Schedule.cosine({start!r}, {end!r})")

    @classmethod
    def points(cls, points: Sequence[float] | Mapping[float, float]) -> Schedule:
        """Through `points`: thresholds spread evenly over the trajectory, or thresholds by fraction, from 0 to 1."""
        if isinstance(points, Mapping):
            if not all(isinstance(fraction, int | float) and not isinstance(fraction, bool) for fraction in points):
                raise wrong_type("threshold", dict(points), "a dict of thresholds by fraction, from 0 to 1")
            ordered = dict(sorted(points.items()))
            return cls(tuple(ordered), tuple(ordered.values()), f"Schedule.points({ordered})")
        if isinstance(points, str) or not isinstance(points, Iterable):
            raise wrong_type("threshold", points, "two or more thresholds in a list, or a dict of them by fraction")
        values = list(points)
        if len(values) < 2:
            raise wrong_value("threshold", values, "two or more thresholds in a list")
        fractions = tuple(i / (len(values) - 1) for i in range(len(values)))
        return cls(fractions, tuple(values), f"Schedule.points({values})")

    def at(self, fraction: float) -> float:
        """The threshold at a fraction from 0 to 1; where it rises from or falls to -inf, -inf is in between."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction!r}; allowed: 0 to 1")
        right = min(bisect_right(self.fractions, fraction), len(self.fractions) - 1)
        (a, b), (low, high) = self.fractions[right - 1 : right + 1], self.thresholds[right - 1 : right + 1]
        if fraction >= b or low == high:
            return high
        weight = (fraction - a) / (b - a)
        return low if weight <= 0 else low * (1 - weight) + high * weight

    def schedule(self, layer: str) -> Schedule:
        """Itself, for any layer."""
        return self

    def __repr__(self) -> str:
        return self.text or f"Schedule({self.fractions}, {self.thresholds})"


_COSINE_STEPS = 256


@dataclass(frozen=True)
class LayerThresholds(Thresholds):
    """Schedules by layer name."""

    patterns: tuple[tuple[str, Schedule], ...]
    """Globs and their schedules; the first that matches counts."""
    default: Schedule

    def schedule(self, layer: str) -> Schedule:
        """That of the first glob that matches, or the default."""
        return next((schedule for glob, schedule in self.patterns if fnmatchcase(layer, glob)), self.default)


def check_number(name: str, value: Any) -> float:
    """A threshold, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, value, NUMBER)
    try:
        number = float(value)
    except OverflowError:  # its digits would fill the message
        raise OptionValueError(
            f"liteattention option {name!r} is beyond the range of a float; allowed: {NUMBER}"
        ) from None
    if math.isnan(number) or number > 0:
        raise wrong_value(name, value, NUMBER)
    return number


def check_threshold(name: str, value: Any) -> float | Thresholds:
    """The option `threshold`: a number stays one, all else becomes `Thresholds`."""
    if isinstance(value, Mapping):
        return _by_layer(name, value)
    if isinstance(value, Thresholds):
        return value
    if isinstance(value, PathLike) or (isinstance(value, str) and not _is_number(value)):
        from .calibration.calibration_file import load_calibration

        return load_calibration(value)
    if isinstance(value, list | tuple):
        numbers = [check_number(f"{name}[{i}]", number) for i, number in enumerate(value)]
        if len(numbers) < 2:
            raise wrong_value(name, value, "two or more thresholds in a list")
        return Schedule.points(numbers)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, value, ALLOWED)
    return check_number(name, value)


def _is_number(text: str) -> bool:
    """Whether a text is a number that lost its type rather than the name of a file."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_thresholds(value: float | Thresholds) -> Thresholds:
    """A checked option as `Thresholds`."""
    return value if isinstance(value, Thresholds) else Schedule.constant(value)


def _by_layer(name: str, value: Mapping[Any, Any]) -> LayerThresholds:
    if not all(isinstance(glob, str) and glob for glob in value):
        raise wrong_type(name, value, ALLOWED)
    if "*" not in value:
        raise wrong_value(
            name, dict(value), "a dict with a threshold under '*', for the layers that no other glob matches"
        )
    schedules: dict[str, Schedule] = {}
    for glob, entry in value.items():
        found = check_threshold(f"{name}[{glob!r}]", entry)
        if not isinstance(found, float | Schedule):
            raise wrong_type(f"{name}[{glob!r}]", entry, "a number, a list of numbers or a lite_compile.Schedule")
        schedules[glob] = Schedule.constant(found) if isinstance(found, float) else found
    default = schedules.pop("*")
    return LayerThresholds(tuple(schedules.items()), default)
