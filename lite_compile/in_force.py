"""What a model's last call followed: thresholds and key ranges, those included that were set after it was compiled."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .calibration.calibration_file import CalibratedThresholds
from .dense_layers import ExactLayers
from .layer_state import Binding, bindings
from .schedule import Schedule, Thresholds
from .step_errors import StepErrors

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the trajectory: where thresholds are shown."""


class ThresholdRow(NamedTuple):
    """The threshold of one layer along the trajectory."""

    layer: str
    values: tuple[str, ...]
    """At `FRACTIONS`, log2 units, as text (JSON has no -inf)."""
    given: str
    """As Python writes what it comes from."""


class InForce(NamedTuple):
    """What the last calls of one or of all models followed."""

    thresholds: tuple[ThresholdRow, ...]
    ranges: tuple[tuple[str, str], ...]
    """Name and value of `must_compute` and `must_skip`, where a graph reads them; several if models differ."""
    errors: StepErrors | None
    """What the calibration that the thresholds come from measured."""


def in_force(model: nn.Module | None) -> InForce:
    """Of `model` (None: of all models), in the order of their layers; empty before their first call."""
    used = sorted((b for b in bindings(model) if not b.expired and b.calls), key=lambda binding: binding.last_call)
    # A model may be compiled, or called in several dtypes: what was used last counts for a layer.
    rows = {row.layer: row for binding in used for row in _rows(binding)}
    ranges = dict.fromkeys(pair for binding in used for pair in _ranges(binding))
    calibrated = [found for b in used if (found := _calibration(b.thresholds.thresholds)) is not None]
    errors = next((found.measured for found in reversed(calibrated) if found.measured is not None), None)
    return InForce(tuple(rows.values()), tuple(ranges), errors)


def _rows(binding: Binding) -> list[ThresholdRow]:
    thresholds = binding.thresholds.thresholds
    if thresholds is None:
        return []
    found = []
    for layer in binding.thresholds.layers:
        schedule = thresholds.schedule(layer)
        values = tuple(f"{schedule.at(fraction):.4g}" for fraction in FRACTIONS)
        found.append(ThresholdRow(layer, values, _given(thresholds, layer, schedule)))
    return found


def _given(thresholds: Thresholds, layer: str, schedule: Schedule) -> str:
    if isinstance(thresholds, ExactLayers) and layer in thresholds.layers:
        return "dense_layers"
    calibration = _calibration(thresholds)
    return repr(schedule if calibration is None else calibration)


def _calibration(thresholds: Thresholds | None) -> CalibratedThresholds | None:
    inner = thresholds.thresholds if isinstance(thresholds, ExactLayers) else thresholds
    return inner if isinstance(inner, CalibratedThresholds) else None


def _ranges(binding: Binding) -> list[tuple[str, str]]:
    ranges = binding.ranges.ranges
    if ranges is None:
        return []
    return [(name, repr(list(value))) for name, value in ranges._asdict().items() if value is not None]
