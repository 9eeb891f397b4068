"""Where a run has its steps, seen in a dense generation."""

from __future__ import annotations

from .intercept import AttendCall


class Survey:
    """Handler for `intercepted`: dense attention, and a note of each call."""

    def __init__(self) -> None:
        self._fractions: set[float] = set()
        self.calls = 0

    def __call__(self, layer: str, call: AttendCall) -> None:
        call.attend_densely()
        self.calls += 1
        if call.fraction >= 0:
            self._fractions.add(call.fraction)

    @property
    def steps(self) -> list[float]:
        """Fractions of the trajectory at which there are steps, rising."""
        return sorted(self._fractions)
