"""`measure_errors`: what skipping does to each layer at each step, under the thresholds that the model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..progress import progress
from ..step_errors import StepErrors
from .arguments import check_run, model_itself
from .generations import Generations
from .intercept import AttendCall
from .points import Points
from .replay import sparse_error


class ErrorMeter:
    """Handler for `intercepted`: attention as the model computes it anyway, and the error of each call."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self.errors: Points = {}
        """The worst over the generations, guidance streams and batch entries."""

    def __call__(self, layer: str, call: AttendCall) -> None:
        call.attend(call.threshold)
        if not call.uses_state:
            return
        if call.fraction < 0:
            raise RuntimeError(
                f"layer {layer!r}: the clock does not know how far the generation is, so errors would have no place; "
                "announced generations need lite_compile.generation(model, steps=N)"
            )
        steps = self.errors.setdefault(layer, {})
        steps[call.fraction] = max(steps.get(call.fraction, 0.0), sparse_error(call, self._metric))


def measure_errors(
    model: nn.Module, run: Callable[..., Any], metric: str = "l1", *, prompts: Sequence[Any] | None = None
) -> StepErrors:
    """Run generations as they are, and compare each attention that may skip with dense attention of its q, k, v.

        errors = lite_compile.measure_errors(pipe.transformer, lambda prompt: pipe(prompt), prompts=[...])
        lite_compile.plot(errors, path="errors.png")

    Masks of the model are void before and after. Waits for the device at each call of a layer, and computes attention
    twice.

    Args:
        model: the denoiser itself, for example `pipe.transformer`, compiled with `backend="liteattention"`.
        run: performs one generation: `run(prompt)` for each of `prompts`, or `run()` without them.
        metric: `"l1"`, `"rmse"` or `"cosine"`.
        prompts: whatever `run` takes; the worst over all of them counts.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: the model's attention does not run through liteattention, or in CUDA graphs; its clock does not
            know where in the trajectory it is.
    """
    original = model_itself(model)
    check_run(run, metric, prompts)
    given: list[Any] = [None] if prompts is None else list(prompts)
    generations, meter = Generations(original, run, prompts is not None), ErrorMeter(metric)
    for prompt in progress(given, "measuring errors"):
        generations.observe(prompt, meter)
    count = f"{len(given)} generation{'s' if len(given) > 1 else ''}"
    return StepErrors.from_points(metric, meter.errors, source=f"measured in {count}")
