"""Run the user's generations, each from a clean start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..control import reset
from .intercept import Handler, intercepted


class Generations:
    """The model, and the callable that performs one generation with it."""

    def __init__(self, model: nn.Module, run: Callable[..., Any], with_prompt: bool) -> None:
        self._model, self._run, self._with_prompt = model, run, with_prompt

    def observe(self, prompt: Any, handle: Handler) -> Any:
        """One generation whose attention `handle` computes; what `run` returned. Leaves no mask behind."""
        reset(self._model)
        try:
            with intercepted(self._model, handle):
                return self._run(prompt) if self._with_prompt else self._run()
        finally:
            reset(self._model)
