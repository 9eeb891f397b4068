"""Where in its trajectory a generation stands, as far as the step clock can tell, and which of its steps stay dense.

The coordinate is the noise level, not the number of the step, so that what holds at a fraction of 50 steps holds at the
same fraction of 30, and under another shift of the schedule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNKNOWN = -1.0
"""The fraction of a call of which nobody knows where it stands."""
FALLS, RISES = -1, 1
THOUSANDS, UNIT = 1000.0, 1.0
"""Where a rising time ends: Mochi counts to 1000, Lumina and Z-Image count to 1."""
LARGEST_FIRST_RISE = 0.25
"""Runs to 1 begin with a smaller rise, unless they have no more than four steps; runs to 1000 with a larger one."""


class DenseSteps(NamedTuple):
    """Steps that compute everything and mark nothing: integers count steps, floats are shares of the trajectory."""

    first: int | float = 0
    last: int | float = 0

    @property
    def key(self) -> tuple[float, float, type, type]:
        """Equal for equal steps; they themselves are equal as well if one step is meant and the whole trajectory."""
        return *self, type(self.first), type(self.last)

    @property
    def any(self) -> bool:
        """Whether there may be such steps."""
        return self.first > 0 or self.last > 0

    @property
    def count_last(self) -> bool:
        """Whether the number of steps has to be known."""
        return isinstance(self.last, int) and self.last > 0


NONE_DENSE = DenseSteps()


def is_refresh(step: Tensor, last_step: Tensor, refresh_every: int) -> Tensor:
    """bool: whether a stream has to mark anew at `step`, as every `refresh_every` steps; 0: never.

    It is due at the first step of the stream from a multiple of `refresh_every` on, so that a stream that skips steps
    (guidance that pauses) does not miss it, and that a step is due once.

    Args:
        last_step: int32, the step that the stream was used in before.
    """
    if refresh_every == 0:
        return torch.zeros_like(last_step, dtype=torch.bool)
    return step // refresh_every > last_step // refresh_every


def time_scale(t: Tensor, first_t: Tensor, scale: Tensor) -> Tensor:
    """Where the time of a rising generation ends, float32; it stays at `THOUSANDS` once it is known to be that.

    Args:
        t, first_t: timestep of the call and of the generation's first call, float32.
        scale: the result at the call before; 0 at the first rise.
    """
    large = (t > UNIT) | (scale == THOUSANDS) | ((scale == 0) & (t - first_t > LARGEST_FIRST_RISE))
    return torch.where(large, THOUSANDS, UNIT).to(torch.float32)


def fraction_of(t: Tensor, first_t: Tensor, direction: Tensor, scale: Tensor, step: Tensor) -> Tensor:
    """Which fraction of the generation's noise is gone, float32 in [0, 1], or `UNKNOWN`.

    The noise level is `t` where time falls and `scale - t` where it rises; the first step of a generation, whichever
    level it begins with, is at 0. Unknown are negative times (the logarithm of a noise level), times beyond their
    scale, and what is not finite.

    Args:
        t, first_t: timestep of the call and of the generation's first call, float32.
        direction: int32, `FALLS`, `RISES` or neither (the second step has not come yet).
        scale: of `time_scale`.
        step: int32, number of the step in the generation.
    """
    rises = direction == RISES
    noise, most = (torch.where(rises, scale - x, x) for x in (t, first_t))
    fraction = 1 - noise / most
    known = torch.isfinite(fraction) & (most > 0) & (noise >= 0) & (rises | (direction == FALLS))
    return torch.where(step == 0, 0.0, torch.where(known, fraction.clamp(0, 1), UNKNOWN)).to(torch.float32)


def fraction_of_steps(step: Tensor, steps: Tensor) -> Tensor:
    """The fraction where nothing but an announced number of `steps` is known (0: not even that), float32."""
    known = (steps > 0) & (step < steps)
    return torch.where(known, step.float() / steps.clamp(min=1), UNKNOWN).to(torch.float32)


def is_dense(step: Tensor, fraction: Tensor, steps: Tensor, dense: DenseSteps) -> Tensor:
    """bool: whether a step is one of the dense ones. Shares count an unknown fraction as inside.

    Args:
        steps: int32, how many the generation is known to have; 0 if that is not known, which goes for any number that
            turns out too small. Then there are no last ones.
    """
    first, last = dense
    begins = step < first if isinstance(first, int) else (fraction < first) & (first > 0)
    if isinstance(last, int):
        return begins | ((step >= steps - last) & (step < steps))
    return begins | (((fraction >= 1 - last) | (fraction < 0)) & (last > 0))
