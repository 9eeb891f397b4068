"""What `calibrate` hands back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..decisions import format_table
from ..step_errors import StepErrors
from .budget import Budget
from .calibration_file import CalibratedThresholds
from .points import Points
from .replay import mean_density


@dataclass(frozen=True)
class Quality:
    """What generations under the thresholds are worth against dense ones of the same seeds."""

    name: str
    """"psnr" (dB) or "ssim"."""
    target: float
    scale: float
    """What the error budget was scaled by: 0.75 times log2 of it was added to the thresholds."""
    calibration: tuple[float, ...]
    """Per calibration prompt."""
    held_out: tuple[float, ...]
    """Per held-out prompt."""

    @property
    def met(self) -> bool:
        """Whether all generations that were measured meet the target."""
        return all(value >= self.target for value in (*self.calibration, *self.held_out))


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and what was measured in generations under them; `str()` is a table by layer."""

    thresholds: CalibratedThresholds
    """What the option `threshold` and `set_threshold` take."""
    metric: str
    target_error: float
    budget: Budget
    """The error allowed at each fraction of the trajectory."""
    errors: Points
    """By layer and fraction: the worst over prompts, guidance streams and batch entries."""
    densities: Points
    """By layer and fraction: share of tiles computed, mean over prompts and streams."""
    path: Path | None
    cost: float
    """Attentions computed per attention of one dense generation of all prompts; those of held-out prompts left out."""
    quality: Quality | None = None

    @property
    def density(self) -> float:
        """Mean over layers and steps."""
        return mean_density(self.densities)

    @property
    def step_errors(self) -> StepErrors:
        """Errors and budget as `plot` and `save_report` take them."""
        source = "calibration" if self.path is None else f"calibration {str(self.path)!r}"
        allowed = {f: self.budget.at(f) for steps in self.errors.values() for f in steps}
        return StepErrors.from_points(self.metric, self.errors, allowed, source)

    @property
    def met(self) -> float:
        """Share of the layers' steps whose error is within their budget, 0 to 1."""
        checks = [error <= self.budget.at(f) for steps in self.errors.values() for f, error in steps.items()]
        return sum(checks) / len(checks) if checks else 1.0

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "threshold first", "last", "worst error", "budget there", "density")]
        for layer, schedule in self.thresholds.layers:
            steps = self.errors.get(layer, {})
            allowed = {f: self.budget.at(f) for f in steps}
            worst = max(steps, key=lambda f: steps[f] / allowed[f]) if steps else math.nan
            measured = (f"{steps[worst]:.2e}", f"{allowed[worst]:.2e}") if steps else ("-", "-")
            density = mean_density({layer: self.densities.get(layer, {})})
            ends = (f"{schedule.thresholds[0]:.1f}", f"{schedule.thresholds[-1]:.1f}")
            rows.append((layer, *ends, *measured, f"{density:.3f}"))
        kept = f"{self.met:.1%} of the layers' steps within their budget"
        if self.quality is not None:  # which decided instead
            kept = f"error budget scaled by {self.quality.scale:.3g}"
        lines = [
            f"calibration of {self.thresholds.model.name}: {self.metric} error up to {self.target_error:g}",
            *format_table(rows),
            f"density {self.density:.3f}; {kept}; cost: the attention of {self.cost:.1f} dense generations per prompt",
        ]
        if self.quality is not None:
            lines.append(_quality_line("calibration", self.quality, self.quality.calibration))
            if self.quality.held_out:
                lines.append(_quality_line("held out", self.quality, self.quality.held_out))
        if self.path is not None:
            lines.append(f"saved in {self.path}")
        return "\n".join(lines)


def _quality_line(kind: str, quality: Quality, values: tuple[float, ...]) -> str:
    met = sum(value >= quality.target for value in values)
    shown = ", ".join(f"{value:.3f}" if quality.name == "ssim" else f"{value:.1f}" for value in values)
    return f"{quality.name} ({kind}): {shown}; {met} of {len(values)} at {quality.target:g} or better"
