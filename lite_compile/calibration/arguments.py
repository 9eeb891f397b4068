"""Check what `calibrate` and `measure_errors` are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..control import check_model
from ..errors import nearest
from .attention_error import METRICS
from .target import QualityTarget


def check_arguments(
    model: nn.Module, run: Callable[..., Any], target_error: float | None, metric: str, prompts: Sequence[Any] | None,
    target_psnr: float | None, target_ssim: float | None, held_out: Sequence[Any] | None,
    value_range: tuple[float, float] | None,
) -> tuple[nn.Module, QualityTarget | None]:  # fmt: skip
    """The model itself and the target on its results; raises for arguments that are out of range."""
    original = model_itself(model)
    check_run(run, metric, prompts)
    if target_error is not None:
        _check_number("target_error", target_error, 1.0)
    _check_list("held_out", held_out)
    targets = [("psnr", target_psnr, 200.0), ("ssim", target_ssim, 1.0)]
    asked = [(name, value, most) for name, value, most in targets if value is not None]
    if len(asked) > 1:
        raise ValueError(f"target_psnr is {target_psnr!r} and target_ssim {target_ssim!r}; allowed: one of them")
    if held_out and (not asked or prompts is None):
        raise ValueError("held_out is for target_psnr or target_ssim, together with prompts")
    if value_range is not None:
        pair = isinstance(value_range, list | tuple) and len(value_range) == 2
        numbers = pair and all(isinstance(x, int | float) and math.isfinite(x) for x in value_range)
        if not numbers or not value_range[0] < value_range[1]:
            raise ValueError(f"value_range is {value_range!r}; allowed: (least, largest), or None")
        if not asked:
            raise ValueError("value_range is for target_psnr and target_ssim")
    if not asked:
        return original, None
    ((name, value, most),) = asked
    _check_number(f"target_{name}", value, most)
    return original, QualityTarget(name, float(value), value_range)


def _check_number(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); allowed: a number above 0, at most {most:g}")
    if not 0 < value <= most:
        raise ValueError(f"{name} is {value!r}; allowed: a number above 0, at most {most:g}")


def model_itself(model: nn.Module) -> nn.Module:
    """What was compiled, where `model` is what torch.compile returned."""
    if model is None:
        raise TypeError("model is None; allowed: a torch.nn.Module")
    checked = check_model(model)
    assert checked is not None
    original: nn.Module = getattr(checked, "_orig_mod", checked)
    return original


def check_run(run: Callable[..., Any], metric: str, prompts: Sequence[Any] | None) -> None:
    """Raise for what performs generations and how they are measured."""
    if not callable(run):
        raise TypeError(f"run is {run!r} ({type(run).__name__}); allowed: a callable that performs one generation")
    if not isinstance(metric, str) or metric not in METRICS:
        allowed = ", ".join(map(repr, METRICS))
        raise ValueError(f"metric is {metric!r}; allowed: {allowed}.{nearest(str(metric), METRICS)}")
    _check_list("prompts", prompts)
    if prompts is not None and not prompts:
        raise ValueError("prompts is empty; allowed: one or more, or None if run takes none")


def _check_list(name: str, listed: Sequence[Any] | None) -> None:
    if isinstance(listed, str) or (listed is not None and not isinstance(listed, Sequence)):
        raise TypeError(f"{name} is {listed!r} ({type(listed).__name__}); allowed: a list of what run takes, or None")
