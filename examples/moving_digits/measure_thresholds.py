"""What does each threshold save, and what does it cost? Dense samples against sparse ones of the same seeds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor
from tqdm import tqdm

import lite_compile
from moving_digits.metrics import psnr, ssim
from moving_digits.pictures import save_gif_grid
from moving_digits.pipeline import Setting
from moving_digits.plots import draw_densities
from moving_digits.sampling import SHOWN_PROMPTS, THRESHOLDS, Sampling, generate, mean


def measure_thresholds(pipe: WanPipeline, setting: Setting, how: Sampling) -> dict[str, Any]:
    """The same seeds dense and at each threshold: density per step and layer, PSNR and SSIM against dense.

    Nothing goes through Inductor, so that what differs is the attention alone; `-inf` shows the rounding that remains.
    """
    model, dense = pipe.transformer, list[Tensor]()
    for number, prompt in enumerate(tqdm(SHOWN_PROMPTS, desc="dense", unit="video")):
        dense += generate(pipe, setting, [prompt], how.seed + number, how.steps, how.guidance)
    rows = [[video] for video in dense]
    runs: dict[str, list[dict[str, Any]]] = {}
    for threshold in (-float("inf"), *THRESHOLDS):
        found = runs.setdefault(str(threshold), [])
        torch._dynamo.reset()
        options: dict[str, Any] = {"threshold": threshold, "inner": "eager"}
        # `stats` is about all compilations of a model: each threshold gets one of its own.
        fresh = copy.deepcopy(model)
        pipe.transformer = torch.compile(fresh, backend="liteattention", options=options)
        for number, prompt in enumerate(tqdm(SHOWN_PROMPTS, desc=f"threshold {threshold:g}", unit="video")):
            steps: list[lite_compile.Stats] = []
            video = generate(
                pipe, setting, [prompt], how.seed + number, how.steps, how.guidance,
                lambda *_, seen=steps, model=fresh: seen.append(lite_compile.stats(model)) or {},
            )[0]  # fmt: skip
            if threshold in THRESHOLDS:
                rows[number].append(video)
            layers = sorted({s.layer for s in steps[-1].streams}, key=lambda name: int(name.split(".")[1]))
            found.append(
                {
                    "prompt": prompt,
                    "density": [step.density for step in steps],
                    "per_layer": {
                        layer: [mean(s.density for s in step.streams if s.layer == layer) for step in steps]
                        for layer in layers
                    },
                    "psnr": float(psnr(dense[number], video, (0, 1))),
                    "ssim": float(ssim(dense[number], video, (0, 1))),
                }
            )
    pipe.transformer = model
    summary = {
        threshold: {
            "density": mean(mean(run["density"]) for run in found),
            "density_last_step": mean(run["density"][-1] for run in found),
            "psnr": mean(run["psnr"] for run in found),
            "ssim": mean(run["ssim"] for run in found),
        }
        for threshold, found in runs.items()
    }
    shown = {str(threshold): summary[str(threshold)] for threshold in THRESHOLDS}
    labels = ["dense", *(f"{t}: {s['density']:.0%}, {s['psnr']:.1f} dB" for t, s in shown.items())]
    save_gif_grid(rows, labels, how.output / "thresholds.gif")
    draw_densities({t: runs[t] for t in shown}, how.output / "density.png")
    return {"prompts": SHOWN_PROMPTS, "steps": how.steps, "summary": summary, "runs": runs}
