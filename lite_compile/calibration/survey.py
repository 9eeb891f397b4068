"""What a generation consists of, seen in a dense one: its steps, and the layers that may skip."""

from __future__ import annotations

from .intercept import AttendCall


class Survey:
    """Handler for `intercepted`: dense attention, and a note of each call."""

    def __init__(self) -> None:
        self._fractions: set[float] = set()
        self.layers: dict[str, int] = {}
        """Calls by layer, of those that may use a state, in the order in which they ran."""
        self.calls = 0

    def __call__(self, layer: str, call: AttendCall) -> None:
        call.attend_densely()
        self.calls += 1
        if call.fraction >= 0:
            self._fractions.add(call.fraction)
        if call.uses_state:
            self.layers[layer] = self.layers.get(layer, 0) + 1

    @property
    def steps(self) -> list[float]:
        """Fractions of the trajectory at which there are steps, rising."""
        return sorted(self._fractions)
