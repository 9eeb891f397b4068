"""Insert the step guard: the node that advances the model's step clock once per call."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument

from ..announce import read_announced
from ..clock import advance, clock_words
from ..clock_source import ClockSource
from ..ops import NOW_WORDS
from ..trajectory import NONE_DENSE, DenseSteps
from .find_clock_inputs import ClockInputs
from .graph_inputs import append_input, fake_mode, placeholders


def insert_step_guard(
    gm: fx.GraphModule, source: ClockInputs | ClockSource, max_streams: int, device: torch.device,
    dense_steps: DenseSteps = NONE_DENSE, refresh_every: int = 0,
) -> fx.Node:  # fmt: skip
    """Append the clock as a graph input and advance it before anything else runs.

    If the user's `lite_compile.generation` announces the steps, the clock is only read. If hooks on the model's root
    keep it, what they read is the input.

    Returns the node that says where the call stands, int32 `[NOW_WORDS]`.
    """
    with fake_mode(gm):
        fake_clock = torch.empty(clock_length(source, max_streams), dtype=torch.int32, device=device)
        fake_now = torch.empty(NOW_WORDS, dtype=torch.int32, device=device)
    if source is ClockSource.ROOT:
        return append_input(gm.graph, "lite_now", fake_now)
    clock = append_input(gm.graph, "lite_clock", fake_clock)
    dense = (tuple(dense_steps),) if dense_steps.any else ()
    refresh: dict[str, Argument] = {"refresh_every": refresh_every} if refresh_every else {}
    with gm.graph.inserting_after(placeholders(gm.graph)[-1]):
        if isinstance(source, ClockSource):
            now = gm.graph.call_function(read_announced, (clock, max_streams, *dense), refresh)
        else:
            latents = [source.latents, *source.more_latents] if source.more_latents else source.latents
            arguments = (clock, latents, source.timestep, list(source.conditions), max_streams, *dense)
            now = gm.graph.call_function(advance, arguments, refresh)
    now.name = "now"
    now.meta["example_value"] = fake_now
    return now


def clock_length(source: ClockInputs | ClockSource, max_streams: int) -> int:
    """Words of the clock that a graph expects."""
    return clock_words(max_streams, len(source.conditions) if isinstance(source, ClockInputs) else 0)
