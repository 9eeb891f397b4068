"""Errors of attention outputs by layer and step, for pictures and reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .decisions import format_table


@dataclass(frozen=True)
class StepErrors:
    """How far each layer's attention output lay from dense attention of the same q, k, v; `str()` is a table."""

    metric: str
    """"l1", "rmse" or "cosine"."""
    fractions: tuple[float, ...]
    """Of the trajectory, 0 to 1, rising: one for each step that was measured."""
    layers: tuple[tuple[str, tuple[float | None, ...]], ...]
    """By layer one error per fraction: the worst over prompts, guidance streams and batch entries. None: no state was
    used there, so nothing was skipped."""
    budget: tuple[float, ...] | None = None
    """The error that was allowed at each fraction, if thresholds were calibrated to one."""
    source: str = ""
    """Where the numbers come from."""

    @classmethod
    def from_points(
        cls, metric: str, errors: Mapping[str, Mapping[float, float]], budget: Mapping[float, float] | None = None,
        source: str = "",
    ) -> StepErrors:  # fmt: skip
        """Of errors by layer and fraction."""
        fractions = tuple(sorted({fraction for steps in errors.values() for fraction in steps}))
        layers = tuple((layer, tuple(steps.get(f) for f in fractions)) for layer, steps in errors.items() if steps)
        allowed = None if budget is None else tuple(budget[fraction] for fraction in fractions)
        return cls(metric, fractions, layers, allowed, source)

    @property
    def worst(self) -> tuple[float | None, ...]:
        """The largest error of any layer, per fraction."""
        steps = zip(*(values for _, values in self.layers), strict=True)
        return tuple(max((error for error in step if error is not None), default=None) for step in steps)

    @property
    def met(self) -> float | None:
        """Share of the layers' steps within the budget, 0 to 1; None without a budget."""
        if self.budget is None:
            return None
        pairs = [(error, most) for _, row in self.layers for error, most in zip(row, self.budget, strict=True)]
        checks = [error <= most for error, most in pairs if error is not None]
        return sum(checks) / len(checks) if checks else 1.0

    def rows(self) -> list[list[str]]:
        """Header, layers, and the budget if there is one."""
        rows = [["layer", *(f"{fraction:.2f}" for fraction in self.fractions)]]
        rows += [[layer, *("" if e is None else f"{e:.1e}" for e in errors)] for layer, errors in self.layers]
        if self.budget is not None:
            rows.append(["budget", *(f"{most:.1e}" for most in self.budget)])
        return rows

    def __str__(self) -> str:
        if not self.layers:
            return "liteattention: no error was measured"
        head = (
            f"{self.metric} error by layer and fraction of the trajectory{f' ({self.source})' if self.source else ''}"
        )
        return "\n".join([head, *format_table(self.rows())])
