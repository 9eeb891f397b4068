"""What the measurements share: samples of the pipeline, and how they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor

from moving_digits.pipeline import Setting

THRESHOLDS = (-14.0, -10.0, -6.0, -3.0, 0.0)
SHOWN_PROMPTS = ("3 right", "7 up fast", "2 left and 8 down", "5 down fast and 0 right slow")


@dataclass(frozen=True)
class Sampling:
    """How samples are made, and where results go.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: of the first sample; further ones count up from it.
        batch: samples at once.
        pairs: prompts with two digits.
        every: use every nth prompt only.
        output: folder.
    """

    steps: int
    guidance: float
    seed: int
    batch: int
    pairs: int
    every: int
    output: Path


def generate(
    pipe: WanPipeline, setting: Setting, prompts: Sequence[str], seed: int, steps: int, guidance: float,
    on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> Tensor:  # fmt: skip
    """Videos `[B, 3, F, H, W]` in 0..1, on the CPU."""
    output = pipe(
        prompt=list(prompts), height=setting.side, width=setting.side, num_frames=setting.num_frames,
        num_inference_steps=steps, guidance_scale=guidance, output_type="np", return_dict=False,
        generator=torch.Generator(pipe.device).manual_seed(seed), callback_on_step_end=on_step_end,
    )[0]  # fmt: skip
    return torch.as_tensor(output).float().permute(0, 4, 1, 2, 3)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; raises `ZeroDivisionError` if there are no values."""
    listed = list(values)
    return sum(listed) / len(listed)
