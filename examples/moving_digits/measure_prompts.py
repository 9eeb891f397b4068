"""Are prompts followed? Digits and directions of many samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor
from tqdm import tqdm

from moving_digits.data import DIRECTIONS, SPEEDS, Actor, VideoSampler, format_prompt
from moving_digits.metrics import evaluate, load_classifier
from moving_digits.pictures import save_contact_sheet, save_gif_grid
from moving_digits.pipeline import Setting
from moving_digits.sampling import Sampling, generate
from moving_digits.train import HELD_OUT

SHARES = ("single_accuracy", "direction_accuracy", "speed_accuracy", "steadiness", "pair_accuracy")


def evaluated_casts(pairs: int, seed: int) -> list[tuple[Actor, ...]]:
    """All prompts with one digit, the ones held out four times, and `pairs` random ones with two."""
    single = [Actor(d, way, speed) for d in range(10) for way in DIRECTIONS for speed in SPEEDS]
    casts: list[tuple[Actor, ...]] = [(a,) for a in single if (a.digit, a.direction, a.speed) not in HELD_OUT]
    casts += [(Actor(*held_out),) for held_out in sorted(HELD_OUT) for _ in range(4)]
    sampler = VideoSampler("test", torch.Generator().manual_seed(seed), frames=1, side=8)
    drawn = [cast for cast in sampler.draw_casts(10 * pairs + 10) if len(cast) == 2]
    return casts + drawn[:pairs]


def measure_prompts(pipe: WanPipeline, setting: Setting, how: Sampling) -> dict[str, Any]:
    """Samples of many prompts, judged by the classifier and by tracking; a contact sheet and a GIF of some."""
    casts = evaluated_casts(how.pairs, how.seed)[:: how.every]
    prompts = [format_prompt(cast) for cast in casts]
    videos: list[Tensor] = []
    for start in tqdm(range(0, len(prompts), how.batch), desc="samples", unit="batch"):
        part = prompts[start : start + how.batch]
        videos += generate(pipe, setting, part, how.seed + start, how.steps, how.guidance)
    classifier = load_classifier().to(pipe.device)
    held_out = [len(c) == 1 and (c[0].digit, c[0].direction, c[0].speed) in HELD_OUT for c in casts]
    groups = {
        "one digit, all": [len(c) == 1 for c in casts], "one digit, prompts held out": held_out,
        "two digits": [len(c) == 2 for c in casts],
    }  # fmt: skip
    result: dict[str, Any] = {}
    for group, chosen in groups.items():
        index = [i for i, wanted in enumerate(chosen) if wanted]
        if index:
            found = evaluate(torch.stack([videos[i] for i in index]) * 2 - 1, [prompts[i] for i in index], classifier)
            shares = {name: getattr(found, name) for name in SHARES}
            result[group] = vars(found) | {name: share for name, share in shares.items() if not math.isnan(share)}
    shown = list(range(0, len(prompts), max(1, len(prompts) // 12)))[:12]
    save_contact_sheet([videos[i] for i in shown], [prompts[i] for i in shown], how.output / "samples.png")
    height = 2 if len(shown) % 2 == 0 else 1
    rows = [[videos[i] for i in shown[row::height]] for row in range(height)]
    save_gif_grid(rows, [""] * len(rows[0]), how.output / "samples.gif")
    return result
