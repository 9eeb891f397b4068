"""Generations that are run twice: after another one in the test's process, and alone in a fresh process."""

from __future__ import annotations

import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from models import compiled, denoise, noise, prompt, run_pipeline, tiny_pipeline, tiny_wan
from torch import Tensor

MODELS: dict[int, tuple[torch.nn.Module, object]] = {}
SCHEDULERS = {
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


def model(seed: int = 0) -> object:
    """The compiled model of this process with this seed."""
    if seed not in MODELS:
        original = tiny_wan(seed)
        MODELS[seed] = (original, compiled(original))
    return MODELS[seed][1]


def generate(
    number: int,
    steps: int = 5,
    *,
    weights: int = 0,
    shape: tuple[int, ...] = (1, 4, 4, 32, 32),
    streams: int = 2,
    noise_seed: int | None = None,
    stop_after: int | None = None,
    dtype: torch.dtype = torch.float32,
    per_token: bool = False,
) -> Tensor:
    """Generation `number`: its own prompt and noise."""
    batch = shape[0]
    prompts = [prompt(10 * number + stream, batch) for stream in range(streams)]
    tokens = shape[2] * (shape[3] // 2) * (shape[4] // 2)

    def expand(t: Tensor) -> Tensor:
        if not per_token:
            return t.expand(batch)
        values = t.expand(batch, tokens).clone()
        values[:, : tokens // shape[2]] = 0  # image-to-video: the first frame is given
        return values

    start = noise(number if noise_seed is None else noise_seed, shape)
    return denoise(model(weights), start, prompts, steps, dtype=dtype, expand_timestep=expand, stop_after=stop_after)


def generate_with(scheduler: str, seed: int, steps: int) -> Tensor:
    """A generation of a real pipeline with another scheduler."""
    return run_pipeline(tiny_pipeline(model(), SCHEDULERS[scheduler]()), seed, steps, prompts=(seed, seed + 1))
