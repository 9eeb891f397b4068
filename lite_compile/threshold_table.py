"""The thresholds of all layers along the trajectory as one tensor, and what a call reads from it, in the graph."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .ops import NOW_FRACTION
from .schedule import Thresholds

POINTS = 257
"""Thresholds per layer, spread evenly over the trajectory: fine enough for the first steps of strongly shifted runs."""
COLUMNS = POINTS + 1
"""The last one holds the most careful threshold, for calls of which nobody knows where they stand."""


@lru_cache(maxsize=64)
def threshold_table(thresholds: Thresholds, layers: tuple[str, ...]) -> Tensor:
    """float32 `[layers, COLUMNS]` on the CPU, log2 units; not to be written to.

    Raises:
        OptionValueError: there is no schedule for one of the layers.
    """
    thresholds.check_layers(layers)
    rows: list[list[float]] = []
    for layer in layers:
        schedule = thresholds.schedule(layer)
        rows.append([*(schedule.at(i / (POINTS - 1)) for i in range(POINTS)), min(schedule.thresholds)])
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float32, device="cpu")  # whatever the default device is


def empty_table(layers: int, device: torch.device) -> Tensor:
    """A table that marks nothing."""
    with torch.inference_mode(False):
        return torch.full((layers, COLUMNS), torch.nan, dtype=torch.float32, device=device)


def read_thresholds(table: Tensor, now: Tensor) -> Tensor:
    """float32 `[layers]`: the thresholds of a call, straight between two points of `table`.

    It ends in a sum, which Inductor computes once for all layers; what is pointwise it would repeat in each.

    Args:
        table: float32 `[layers, COLUMNS]`.
        now: int32 `[NOW_WORDS]`.
    """
    fraction = now[NOW_FRACTION].view(torch.float32)
    known = fraction >= 0
    place = torch.where(known, fraction.clamp(0, 1), 0.0) * (POINTS - 1)
    column = torch.where(known, place.floor().clamp(max=POINTS - 2), POINTS - 1)
    weight = torch.where(known, place - column, 1.0)
    low, high = table[:, :-1], table[:, 1:]
    between = low * (1 - weight) + high * weight
    # Exact where nothing changes, and no 0 * inf.
    value = torch.where((low == high) | (weight == 0), low, torch.where(weight == 1, high, between))
    here = torch.arange(POINTS, device=table.device) == column
    return torch.where(here, value, 0.0).sum(1)
