"""`clock.advance` outside of a graph, for the clock of a root."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .clock import advance
from .trajectory import NONE_DENSE, DenseSteps

MAX_NUMBERS = 64
"""Numbers among the arguments that are kept as tensors."""


@dataclass(frozen=True)
class ClockRules:
    """How a clock is advanced."""

    max_streams: int
    device: torch.device
    dense_steps: DenseSteps = NONE_DENSE
    refresh_every: int = 0
    key: tuple[Hashable, ...] = field(init=False, compare=False)
    """Equal for equal rules."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.max_streams, self.device, *self.dense_steps.key, self.refresh_every))


class ClockAdvance:
    """Advances one clock."""

    def __init__(self, rules: ClockRules) -> None:
        self._rules = rules
        self._numbers: dict[float, Tensor] = {}

    def __call__(
        self, clock: Tensor, latents: Sequence[Tensor], timestep: Tensor | float, conditions: Sequence[Tensor | float]
    ) -> Tensor:
        """`clock.advance`; `timestep` and `conditions` may be numbers."""
        rules = self._rules
        watched = [x if isinstance(x, Tensor) else self._as_tensor(x) for x in conditions]
        t = timestep if isinstance(timestep, Tensor) else self._as_tensor(timestep)
        return advance(clock, latents, t, watched, rules.max_streams, rules.dense_steps, rules.refresh_every)

    def _as_tensor(self, x: float) -> Tensor:
        """A number on the clock's device; the same ones come again at each step or generation."""
        if x not in self._numbers:
            if len(self._numbers) >= MAX_NUMBERS:
                self._numbers.clear()
            # `identify` takes numbers in float64 as well.
            self._numbers[x] = torch.full((1,), x, dtype=torch.float64, device=self._rules.device)
        return self._numbers[x]
