"""Say where a generation begins and ends, for those who do not want to leave it to the step clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .announce import Generation, pop, push, restart
from .clock import RESET
from .layer_state import bindings


def check_model(model: nn.Module | None) -> nn.Module | None:
    """`model` itself; raises `TypeError` for anything but a module or None."""
    if model is not None and not isinstance(model, nn.Module):
        hint = "pass the denoiser itself, for example pipe.transformer"
        raise TypeError(f"model is {model!r} ({type(model).__name__}); allowed: a torch.nn.Module or None; {hint}")
    return model


def reset(model: nn.Module | None = None) -> None:
    """Make the next call of `model` (None: of every model) start a new generation: all its skip masks are void.

    Does not wait for the device, and frees nothing. A part of a model stands for the whole.
    """
    with torch.inference_mode(False), torch.no_grad():
        for binding in bindings(check_model(model)):
            with binding.lock:
                binding.clock[RESET].fill_(1)
                restart(binding.clock)


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
    reset(model)
    current = Generation(None if model is None else [*model.parameters(), *model.buffers()])
    push(current)
    try:
        yield current
    finally:
        pop(current)
        reset(model)
