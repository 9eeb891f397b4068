"""What can be said about a compiled model: where its generations begin and end, and its threshold and ranges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .announce import Generation, pop, push, restart
from .clock import RESET
from .key_ranges import KeyRanges, check_disjoint, check_ranges
from .layer_state import bindings, bindings_in_use
from .overrides import override
from .schedule import as_thresholds, check_threshold
from .threshold_table import threshold_table


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


def set_threshold(model: nn.Module, threshold: Any) -> None:
    """Let a compiled model follow another threshold: nothing is compiled anew, its next call starts a new generation.

    It takes the place of the option in all graphs of `model`, those that are yet to be compiled included, until it is
    set again. Other models that share these graphs keep theirs.

    Args:
        model: the denoiser itself, such as `pipe.transformer`, compiled or not.
        threshold: whatever the option `threshold` may be.

    Raises:
        OptionTypeError, OptionValueError: as for the option; nothing has changed then.
    """
    original = _original(model)
    thresholds = as_thresholds(check_threshold("threshold", threshold))
    parts = [binding for binding in bindings(original) if binding.is_part_of(original)]
    thresholds.check_model([original], [layer for binding in parts for layer in binding.thresholds.layers])
    for binding in parts:
        thresholds.check_criterion(binding.thresholds.criterion)
        threshold_table(thresholds, binding.thresholds.layers)  # raises if it does not fit
    override(original, thresholds)


def set_ranges(model: nn.Module, *, must_compute: Any = None, must_skip: Any = None) -> None:
    """Let a compiled model follow other ranges of keys; compiles nothing, and the next call starts a new generation.

    They take the place of the options of the same names, of which at least `[]` has to have been given when the model
    was compiled; see `set_threshold`.

    Args:
        model: the denoiser itself, such as `pipe.transformer`, compiled or not.
        must_compute, must_skip: whatever the options may be; `[]` is none, None leaves them as they are.

    Raises:
        OptionTypeError, OptionValueError: as for the options, or the ranges do not fit the layers that are known;
            nothing has changed then.
    """
    original = _original(model)
    ranges = KeyRanges(check_ranges("must_compute", must_compute), check_ranges("must_skip", must_skip))
    check_disjoint(ranges)
    for binding in bindings_in_use(original):
        if binding.is_part_of(original):
            binding.check_ranges(ranges)
    override(original, ranges=ranges)


def _original(model: nn.Module) -> nn.Module:
    if model is None:
        raise TypeError("model is None; allowed: a torch.nn.Module")
    original: nn.Module = getattr(check_model(model), "_orig_mod", model)
    return original


@contextmanager
def generation(model: nn.Module | None = None, steps: int | None = None) -> Iterator[Generation]:
    """Within the context is one generation of `model` (None: of every model): masks are void before and after it.

    For a model in which the report finds no clock, the context also *is* the clock: make the first call of the compiled
    model inside of it, and announce each call.

        with lite_compile.generation(model) as g:
            for t in timesteps:
                g.step()          # g.step(stream=1) before the call for another prompt
                model(...)

    Args:
        steps: how many denoising steps there will be. `dense_steps` needs to know in order to count from the end, and
            schedules do where the context is the clock.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps < 2**30):
        raise ValueError(f"steps is {steps!r}; allowed: an integer >= 1, or None")
    reset(model)
    current = Generation(None if model is None else [*model.parameters(), *model.buffers()], steps or 0)
    push(current)
    try:
        yield current
    finally:
        pop(current)
        reset(model)
