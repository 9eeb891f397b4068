"""The file of a finished calibration: thresholds, what was measured under them, and of what model."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..environment import installed_version
from .attention_error import METRICS
from .calibration_file import LayerColumn, write_calibration
from .result import Calibration


def write_result(calibration: Calibration, path: Path, fractions: Sequence[float], prompts: int) -> None:
    """Write the file."""
    settings: dict[str, Any] = {
        "metric": calibration.metric, "meaning": METRICS[calibration.metric], "target_error": calibration.target_error,
        "criterion": calibration.thresholds.criterion,
        "within_budget": calibration.met, "density": calibration.density, "prompts": prompts,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    tables: dict[str, dict[str, Any]] = {"calibration": settings}
    if calibration.quality is not None:
        q = calibration.quality
        tables["quality"] = {
            "measure": q.name, "target": q.target, "scale": q.scale, "calibration": list(q.calibration),
            "held_out": list(q.held_out),
        }  # fmt: skip
    model = calibration.thresholds.model
    tables["model"] = {"class": model.name, "parameters": model.parameters, "digest": model.digest}
    tables["versions"] = {name: installed_version(name) for name in ("lite-compile", "torch", "triton")}
    layers = {}
    for layer, schedule in calibration.thresholds.layers:
        measured = (calibration.errors.get(layer, {}), calibration.densities.get(layer, {}))
        errors, densities = (tuple(steps.get(f, math.nan) for f in fractions) for steps in measured)
        layers[layer] = LayerColumn(tuple(schedule.at(f) for f in fractions), errors, densities)
    write_calibration(path, tables, fractions, [calibration.budget.at(f) for f in fractions], layers)
