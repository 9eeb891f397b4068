"""How close what a run returns is to what it returns with dense attention: PSNR and SSIM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ALLOWED = (
    "a tensor (latents or frames, height and width last), a numpy array (height, width, channels last), a PIL image, a "
    "list of these, or an output of diffusers with .frames or .images"
)
WINDOW, SIGMA = 11, 1.5


def read_output(result: Any) -> Tensor:
    """What `run` returned, float64 `[..., H, W]` on the CPU; raises `TypeError` for anything that is not allowed."""
    for name in ("frames", "images"):
        if hasattr(result, name):
            result = getattr(result, name)
            break
    parts = list(_arrays(result))
    if not parts or len({part.shape for part in parts}) != 1:
        raise TypeError(f"run() returned a {type(result).__name__} of arrays of several shapes; allowed: {ALLOWED}")
    joined = parts[0] if len(parts) == 1 else torch.stack(parts)
    if joined.dim() < 2 or joined.numel() == 0:
        raise TypeError(f"run() returned an array of shape {tuple(joined.shape)}; allowed: {ALLOWED}")
    return joined


def _arrays(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result.detach().double().cpu()
    elif isinstance(result, np.ndarray):
        yield _channels_first(result)
    elif hasattr(result, "getbands"):  # PIL
        yield _channels_first(np.asarray(result))
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _arrays(part)
    else:
        advice = "" if result is not None else "; let it return what the pipeline returned"
        raise TypeError(f"run() returned {type(result).__name__}; allowed: {ALLOWED}{advice}")


def _channels_first(array: np.ndarray[Any, Any]) -> Tensor:
    tensor = torch.from_numpy(np.array(array)).double()
    return tensor.movedim(-1, -3) if tensor.dim() >= 3 else tensor


def value_range(result: Any, dense: Tensor, given: tuple[float, float] | None) -> float:
    """Width of the range of values: as given, 255 for 8 bits, else what the dense result spans."""
    if given is not None:
        return given[1] - given[0]
    for name in ("frames", "images"):
        result = getattr(result, name, result)
    while isinstance(result, list | tuple) and result:
        result = result[0]
    if hasattr(result, "getbands") or str(getattr(result, "dtype", "")).endswith("uint8"):
        return 255.0
    return float(dense.max() - dense.min())


def psnr(a: Tensor, b: Tensor, width: float) -> float:
    """Peak signal-to-noise ratio in dB over everything; infinite if they are equal, -inf if one is not finite."""
    error = float((a - b).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return math.inf if error == 0 else 20 * math.log10(max(width, 1e-300)) - 10 * math.log10(error)


def ssim(a: Tensor, b: Tensor, width: float) -> float:
    """Structural similarity, mean over planes `[H, W]` (Wang et al. 2004: gaussians, constants 0.01 and 0.03)."""
    height, columns = a.shape[-2:]
    if min(height, columns) < WINDOW:
        raise ValueError(f"target_ssim needs results of {WINDOW} x {WINDOW} or more, not {height} x {columns}")
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.softmax(-(offsets**2) / (2 * SIGMA**2), 0)

    def average(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))

    x, y = (plane.reshape(-1, 1, height, columns) / max(width, 1e-300) for plane in (a, b))
    mean_x, mean_y = average(x), average(y)
    variance_x, variance_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    covariance = average(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    value = float((luminance * structure).mean())
    return value if math.isfinite(value) else -math.inf
