"""How near the videos of a method are to those of dense attention, and how steady they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from moving_digits.metrics import DigitClassifier, evaluate, psnr, ssim
from torch import Tensor

LEVELS = 255


def flicker(video: Tensor) -> float:
    """How much the background of a video `[3, F, H, W]` in 0..1 jumps from frame to frame, in levels of 0 to 255.

    The mean of |x[t-1] - 2 x[t] + x[t+1]| / 2 over the channels of pixels that are background in all three frames. What
    changes at constant speed, as a drifting background does nearly, adds nothing. Background is what is darker, in its
    brightest channel, than the middle between the video's median and its 99th percentile, as `metrics.track` has it.
    """
    level = video.float().amax(0)
    values = level.flatten()
    dark = level < (values.median() + values.quantile(0.99)) / 2
    seen = dark[:-2] & dark[1:-1] & dark[2:]
    jumps = (video[:, :-2] - 2 * video[:, 1:-1] + video[:, 2:]).abs().float().mean(0) / 2
    return LEVELS * float(jumps[seen].mean())


def judge(
    videos: Tensor, dense: Tensor, prompts: Sequence[str], classifier: DigitClassifier | None = None
) -> dict[str, Any]:
    """Metrics of videos `[B, 3, F, H, W]` in 0..1 against the dense ones of the same prompts and seeds.

    PSNR is None where videos are equal.
    """
    ratios, similarities = psnr(dense, videos, (0, 1)), ssim(dense, videos, (0, 1))
    found = evaluate(videos * 2 - 1, prompts, classifier)
    return {
        "psnr_mean": _finite(float(ratios.mean())),
        "psnr_worst": _finite(float(ratios.min())),
        "ssim_mean": float(similarities.mean()),
        "ssim_worst": float(similarities.min()),
        "flicker": sum(map(flicker, videos)) / len(videos),
        "digits_right": found.single_digits + found.pair_digits,
        "digits_of": found.singles + found.pairs,
        "directions_right": found.directions,
        "steady": found.steady,
        "directions_of": found.singles,
        "psnr": [_finite(ratio) for ratio in torch.as_tensor(ratios).tolist()],
        "ssim": similarities.tolist(),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
