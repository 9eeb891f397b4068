"""Where a graph's clock comes from, if the graph itself does not show what a clock reads."""

from __future__ import annotations

from enum import Enum


class ClockSource(Enum):
    """Who advances the clock of a graph that has neither latents nor timestep among its inputs."""

    ANNOUNCED = "the user's `lite_compile.generation`"
    ROOT = "hooks on the module that the graph is a part of"
