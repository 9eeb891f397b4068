"""Say where a generation begins and ends, for those who do not want to leave it to the step clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .announce import Generation, pop, push
from .clock import RESET
from .layer_state import clocks


def model_parameters(model: nn.Module | None) -> list[Tensor] | None:
    """Parameters and buffers of `model`, the keys of its state; None for None, which stands for all models."""
    if model is None:
        return None
    if not isinstance(model, nn.Module):
        hint = "pass the denoiser itself, for example pipe.transformer"
        raise TypeError(f"model is {model!r} ({type(model).__name__}); allowed: a torch.nn.Module or None; {hint}")
    return [*model.parameters(), *model.buffers()]


def reset(model: nn.Module | None = None) -> None:
    """Make the next call of `model` (None: of every model) start a new generation: all its skip masks are void.

    Does not wait for the device, and frees nothing.
    """
    with torch.inference_mode(False), torch.no_grad():
        for clock in clocks(model_parameters(model)):
            clock[RESET].fill_(1)


@contextmanager
def generation(model: nn.Module | None = None) -> Iterator[Generation]:
    """Within the context is one generation of `model` (None: of every model): masks are void before and after it.

    For a model in which the report finds no clock, the context also *is* the clock: make the first call of the compiled
    model inside of it, and announce each call.

        with lite_compile.generation(model) as g:
            for t in timesteps:
                g.step()          # g.step(stream=1) before the call for another prompt
                model(...)
    """
    current = Generation(model_parameters(model))
    reset(model)
    push(current)
    try:
        yield current
    finally:
        pop(current)
        reset(model)
