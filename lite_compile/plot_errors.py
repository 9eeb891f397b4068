"""Draw errors by layer and step, and the worst of each step against what was allowed."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .calibration.calibration_file import CalibratedThresholds
from .calibration.result import Calibration
from .in_force import in_force
from .step_errors import StepErrors

COLOURS = "magma_r"
WORST, ALLOWED = "#20466b", "#c8642b"


def errors_to_draw(source: object) -> StepErrors:
    """Errors of what `plot` may be given; `ValueError` if there are none."""
    if isinstance(source, Calibration):
        found: StepErrors | None = source.step_errors
    elif isinstance(source, CalibratedThresholds):
        found = source.measured
    elif isinstance(source, nn.Module) or source is None:
        found = in_force(source).errors
    elif isinstance(source, StepErrors):
        found = source
    else:
        raise TypeError(
            f"model is {source!r} ({type(source).__name__}); allowed with show='error': what measure_errors, calibrate "
            "or load_calibration returned, or a model that follows a calibration"
        )
    if found is None or not found.layers:
        raise ValueError(
            "no error was measured; run lite_compile.measure_errors(model, run) and give plot what it returns, or let "
            "the model follow a calibration"
        )
    return found


def draw_errors(figure: Any, errors: StepErrors, draw_steps: Any) -> None:
    """Left a heat map of layers and steps, right the worst layer of each step and the budget."""
    heat, lines = figure.subplots(1, 2, width_ratios=(1.2, 1))
    rows = [[math.nan if e is None else e for e in row] for _, row in errors.layers]
    worst = [math.nan if e is None else e for e in errors.worst]
    highest = max((value for value in worst if math.isfinite(value)), default=0.0)
    image = draw_steps(heat, [layer for layer, _ in errors.layers], rows, COLOURS, highest or 1.0)
    heat.set_title(f"{errors.metric} error of each layer", fontsize=10, loc="left")
    figure.colorbar(image, ax=heat, pad=0.02)
    lines.plot(errors.fractions, worst, "o-", color=WORST, markersize=3, label="worst layer")
    if errors.budget is not None:
        lines.plot(errors.fractions, errors.budget, "--", color=ALLOWED, label="budget")
    lines.set(xlabel="fraction of the trajectory", xlim=(-0.02, 1.02))
    lines.set_ylim(bottom=0)
    lines.set_title("worst layer of each step", fontsize=10, loc="left")
    lines.tick_params(length=2, labelsize=8)
    lines.legend(fontsize=8, frameon=False)
    if errors.source:
        figure.suptitle(errors.source, x=0.01, ha="left", fontsize=9)
