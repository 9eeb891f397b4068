"""At which noise levels does the prompt matter to the loss?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import WanPipeline
from tqdm import tqdm

from moving_digits.data import DIRECTIONS, SPEEDS, Actor, VideoSampler, format_prompt
from moving_digits.identity_vae import fold
from moving_digits.pipeline import Setting
from moving_digits.sampling import Sampling

NOISE_LEVELS = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998)


def measure_conditioning(pipe: WanPipeline, setting: Setting, how: Sampling) -> dict[str, Any]:
    """Loss of velocity at several sigmas, given the right prompt, and how much more it is given another one."""
    sampler = VideoSampler("test", torch.Generator().manual_seed(how.seed), pipe.device, setting.frames, setting.side)
    directions = tuple(DIRECTIONS)
    right = [Actor(n % 10, directions[n % 4], SPEEDS[n % 2]) for n in range(how.batch)]
    opposite = {"right": "left", "left": "right", "up": "down", "down": "up"}
    prompts = {
        "right prompt": right,
        "another digit": [replace(a, digit=(a.digit + 5) % 10) for a in right],
        "the opposite direction": [replace(a, direction=opposite[a.direction]) for a in right],
    }
    texts = {name: [format_prompt([a]) for a in actors] for name, actors in prompts.items()}
    texts["no prompt"] = [""] * how.batch
    mean, std = pipe.vae.config.latents_mean[0], pipe.vae.config.latents_std[0]
    latents = (fold(sampler.render([(a,) for a in right])) - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(how.seed)).to(latents)
    result: dict[str, Any] = {}
    for sigma in tqdm(NOISE_LEVELS, desc="noise levels"):
        noisy = torch.lerp(latents, noise, sigma).to(pipe.transformer.dtype)
        loss = {}
        for name, text in texts.items():
            embeds = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)[0]
            timestep = torch.full((how.batch,), 1000 * sigma, device=noisy.device)
            velocity = pipe.transformer(noisy, timestep, embeds, return_dict=False)[0]
            loss[name] = float((velocity.float() - (noise - latents)).square().mean())
        base = loss["right prompt"]
        result[str(sigma)] = {name: value if name == "right prompt" else value - base for name, value in loss.items()}
    return result
