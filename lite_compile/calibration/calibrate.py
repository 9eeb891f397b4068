"""`calibrate`: the boldest thresholds, by layer and step, that keep an error budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..environment import installed_version
from .arguments import check_arguments
from .budget import Budget, Share, default_share
from .digest import digest
from .fingerprint import fingerprint
from .generations import Generations
from .journal import Journal
from .phases import Phases
from .result import Calibration

TARGET_ERROR = 0.05


def calibrate(
    model: nn.Module,
    run: Callable[..., Any],
    target_error: float | None = None,
    metric: str = "l1",
    out: str | os.PathLike[str] | None = None,
    *,
    prompts: Sequence[Any] | None = None,
    share: Share = default_share,
    target_psnr: float | None = None,
    target_ssim: float | None = None,
    held_out: Sequence[Any] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Calibration:
    """Find the boldest thresholds, by layer and step, under which each layer's attention keeps its error budget.

        pipe.transformer = torch.compile(pipe.transformer, backend="liteattention")
        lite_compile.calibrate(pipe.transformer, lambda prompt: pipe(prompt), out="wan.toml", prompts=[...])

    Masks of the model are void before and after; the option `threshold` and `set_threshold` have no say meanwhile and
    are as before afterwards, also after an exception. Waits for the device at each call of a layer.

    Args:
        model: the denoiser itself, for example `pipe.transformer`, compiled with `backend="liteattention"`.
        run: performs one generation: `run(prompt)` for each of `prompts`, or `run()` without them.
        target_error: largest error of a layer's attention output against dense attention of the same q, k, v; each step
            may use `share` of it; None: 0.05. With `target_psnr` or `target_ssim`: where the search begins; None:
            half the root mean square error that the PSNR stands for, 0.00625 to 0.1, or 0.05.
        metric: `"l1"`, `"rmse"` or `"cosine"` (`attention_error.METRICS`).
        out: the TOML file to write. Beside it lies `<out>.partial` meanwhile, which a run that was cut off goes on
            from.
        prompts: whatever `run` takes; the most careful thresholds over all of them count.
        share: of a step's position in the run (0 the first, 1 the last): the share of `target_error` that it may use.
        target_psnr: dB. Instead of `target_error`: the sparsest thresholds under which what `run` returns (a tensor, an
            array, images or an output of diffusers) is as close to a dense generation.
        target_ssim: likewise, 0 to 1.
        held_out: prompts that the result is measured on for `target_psnr` and `target_ssim`.
        value_range: least and largest value of what `run` returns, for PSNR and SSIM. None: 0 to 255 for 8 bits, else
            what each dense result spans.

    Raises:
        ValueError, TypeError: an argument is out of range; dense generations of `run` differ from each other.
        RuntimeError: the model's attention does not run through liteattention, or in CUDA graphs; its clock does not
            know where in the trajectory it is.
    """
    original, quality = check_arguments(
        model, run, target_error, metric, prompts, target_psnr, target_ssim, held_out, value_range
    )
    if target_error is None:
        target_error = TARGET_ERROR if quality is None else quality.first_error(TARGET_ERROR)
    given: list[Any] = [None] if prompts is None else list(prompts)
    budget = Budget(float(target_error), metric, share)
    budget.at(0.0), budget.at(1.0)
    path = None if out is None else Path(os.fspath(out))
    if path is not None and not path.resolve().parent.is_dir():
        raise ValueError(f"out is {str(path)!r}; allowed: a file in a folder that exists")
    generations = Generations(original, run, prompts is not None)
    journal = Journal(
        None if path is None else path.with_name(f"{path.name}.partial"),
        {
            "model": str(fingerprint(original)), "target_error": budget.target, "metric": metric,
            "shares": [budget.at(i / 16) for i in range(17)], "prompts": digest(given),
            "held_out": digest(list(held_out or ())),
            "quality": None if quality is None else [quality.name, quality.value, quality.given_range],
            "lite-compile": installed_version("lite-compile"),
        },
    )  # fmt: skip
    calibration = Phases(original, generations, budget, given, journal).carry_out(quality, list(held_out or ()), path)
    journal.remove()
    return calibration
