"""Measure the trained model: are prompts followed, what does each threshold cost, does sparsity last over the steps?

    python examples/moving_digits/evaluate.py prompts      # digits and directions of many samples
    python examples/moving_digits/evaluate.py thresholds   # dense against liteattention, density and PSNR
    python examples/moving_digits/evaluate.py coherence    # is a tile that is negligible now negligible later?
    python examples/moving_digits/evaluate.py conditioning # at which noise levels does the prompt matter to the loss?

Each writes a JSON file and pictures into `--output`. Made for a GPU: on a CPU a sample takes a minute or more.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lite_compile
from moving_digits.data import DIRECTIONS, SPEEDS, Actor, VideoSampler, format_prompt
from moving_digits.identity_vae import fold
from moving_digits.metrics import evaluate, load_classifier, psnr, ssim
from moving_digits.pictures import save_contact_sheet, save_gif_grid
from moving_digits.pipeline import Setting, load_pipeline, setting_of
from moving_digits.train import HELD_OUT

THRESHOLDS = (-14.0, -10.0, -6.0, -3.0, 0.0)
SHOWN_PROMPTS = ("3 right", "7 up fast", "2 left and 8 down", "5 down fast and 0 right slow")
NOISE_LEVELS = (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998)
TILE_Q = TILE_K = 128
LOG2_E = 1.4426950408889634


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


def evaluated_casts(pairs: int, seed: int) -> list[tuple[Actor, ...]]:
    """All prompts with one digit, the ones held out four times, and `pairs` random ones with two."""
    single = [Actor(d, way, speed) for d in range(10) for way in DIRECTIONS for speed in SPEEDS]
    casts: list[tuple[Actor, ...]] = [(a,) for a in single if (a.digit, a.direction, a.speed) not in HELD_OUT]
    casts += [(Actor(*held_out),) for held_out in sorted(HELD_OUT) for _ in range(4)]
    sampler = VideoSampler("test", torch.Generator().manual_seed(seed), frames=1, side=8)
    drawn = [cast for cast in sampler.draw_casts(10 * pairs + 10) if len(cast) == 2]
    return casts + drawn[:pairs]


def measure_prompts(pipe: WanPipeline, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Samples of many prompts, judged by the classifier and by tracking; a contact sheet and a GIF of some."""
    casts = evaluated_casts(args.pairs, args.seed)[:: args.every]
    prompts = [format_prompt(cast) for cast in casts]
    videos: list[Tensor] = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="samples", unit="batch"):
        part = prompts[start : start + args.batch]
        videos += generate(pipe, setting, part, args.seed + start, args.steps, args.guidance)
    classifier = load_classifier().to(pipe.device)
    held_out = [len(c) == 1 and (c[0].digit, c[0].direction, c[0].speed) in HELD_OUT for c in casts]
    groups = {
        "one digit, all": [len(c) == 1 for c in casts], "one digit, prompts held out": held_out,
        "two digits": [len(c) == 2 for c in casts],
    }  # fmt: skip
    result = {}
    for name, chosen in groups.items():
        index = [i for i, wanted in enumerate(chosen) if wanted]
        if index:
            found = evaluate(torch.stack([videos[i] for i in index]) * 2 - 1, [prompts[i] for i in index], classifier)
            result[name] = {
                **vars(found),
                "single_accuracy": found.single_accuracy,
                "direction_accuracy": found.direction_accuracy,
                "pair_accuracy": found.pair_accuracy,
            }
    shown = list(range(0, len(prompts), max(1, len(prompts) // 12)))[:12]
    save_contact_sheet([videos[i] for i in shown], [prompts[i] for i in shown], args.output / "samples.png")
    columns = [[videos[i] for i in shown[row::2]] for row in range(2)]
    save_gif_grid(columns, [""] * len(columns[0]), args.output / "samples.gif")
    return result


def measure_thresholds(pipe: WanPipeline, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """The same seeds dense and at each threshold: density per step and layer, PSNR and SSIM against dense.

    Nothing goes through Inductor, so that what differs is the attention alone; `-inf` shows the rounding that remains.
    """
    model, dense = pipe.transformer, list[Tensor]()
    for number, prompt in enumerate(tqdm(SHOWN_PROMPTS, desc="dense", unit="video")):
        dense += generate(pipe, setting, [prompt], args.seed + number, args.steps, args.guidance)
    rows = [[video] for video in dense]
    runs: dict[str, list[dict[str, Any]]] = {}
    for threshold in (-float("inf"), *THRESHOLDS):
        found = runs.setdefault(str(threshold), [])
        torch._dynamo.reset()
        options: dict[str, Any] = {"threshold": threshold, "inner": "eager"}
        pipe.transformer = torch.compile(model, backend="liteattention", options=options)
        for number, prompt in enumerate(tqdm(SHOWN_PROMPTS, desc=f"threshold {threshold:g}", unit="video")):
            steps: list[lite_compile.Stats] = []
            video = generate(
                pipe, setting, [prompt], args.seed + number, args.steps, args.guidance,
                lambda *_, seen=steps: seen.append(lite_compile.stats(model)) or {},
            )[0]  # fmt: skip
            if threshold in THRESHOLDS:
                rows[number].append(video)
            layers = sorted({s.layer for s in steps[-1].streams}, key=lambda name: int(name.split(".")[1]))
            found.append(
                {
                    "prompt": prompt,
                    "density": [step.density for step in steps],
                    "per_layer": {
                        layer: [_mean(s.density for s in step.streams if s.layer == layer) for step in steps]
                        for layer in layers
                    },
                    "psnr": float(psnr(dense[number], video, (0, 1))),
                    "ssim": float(ssim(dense[number], video, (0, 1))),
                }
            )
    pipe.transformer = model
    summary = {
        threshold: {
            "density": _mean(_mean(run["density"]) for run in found),
            "density_last_step": _mean(run["density"][-1] for run in found),
            "psnr": _mean(run["psnr"] for run in found),
            "ssim": _mean(run["ssim"] for run in found),
        }
        for threshold, found in runs.items()
    }
    shown = {str(threshold): summary[str(threshold)] for threshold in THRESHOLDS}
    labels = ["dense", *(f"{t}: {s['density']:.0%}, {s['psnr']:.1f} dB" for t, s in shown.items())]
    save_gif_grid(rows, labels, args.output / "thresholds.gif")
    draw_densities({t: runs[t] for t in shown}, args.output / "density.png")
    return {"prompts": SHOWN_PROMPTS, "steps": args.steps, "summary": summary, "runs": runs}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def draw_densities(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Density against step: one panel per threshold, one line per layer (mean over prompts and streams)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(runs), figsize=(3.1 * len(runs), 3.4), sharey=True, layout="constrained")
    colours = plt.get_cmap("viridis")
    for axes, (threshold, found) in zip(panels, runs.items(), strict=True):
        layers = list(found[0]["per_layer"])
        for number, layer in enumerate(layers):
            curves = torch.tensor([run["per_layer"][layer] for run in found]).mean(0)
            colour = colours(number / len(layers))
            axes.plot(range(1, len(curves) + 1), curves, color=colour, label=layer, linewidth=1.4)
        axes.set(title=f"threshold {float(threshold):g}", xlabel="denoising step", ylim=(0, 1.03))
        axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of tiles computed")
    panels[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


class GapRecorder(TorchFunctionMode):
    """While active, keeps for each self-attention how far each tile lies below the final maxima of its rows.

    `gaps` holds one float16 `[heads, q_tiles, k_tiles]` per call, log2 units: the least distance over the tile's rows.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.gaps = tokens, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args, strict=False)) | kwargs
            q, k = named["query"], named["key"]
            if q.shape[2] == k.shape[2] == self.tokens:
                self.gaps.append(tile_gaps(q[0], k[0]))
        return func(*args, **kwargs)


def tile_gaps(q: Tensor, k: Tensor) -> Tensor:
    """`GapRecorder.gaps` of q and k `[heads, tokens, head_dim]`, a multiple of the tile."""
    scores = (q.float() @ k.float().transpose(1, 2)) * (q.shape[-1] ** -0.5 * LOG2_E)
    maxima = scores.unflatten(2, (-1, TILE_K)).amax(3)
    below = maxima.amax(2, keepdim=True) - maxima
    rows: Tensor = below.unflatten(1, (-1, TILE_Q))
    return rows.amin(2).half().cpu()


def measure_coherence(pipe: WanPipeline, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Of the tiles that an oracle would mark at step t, the share that it would still mark 1, 5, ... steps later.

    The oracle knows the final maximum of each row. Dense trajectory, one seed per prompt, every layer and both streams.
    """
    if setting.tokens % TILE_Q:
        raise SystemExit(f"evaluate: {setting.tokens} tokens are no multiple of {TILE_Q}")
    kept: dict[str, dict[str, list[float]]] = {str(t): {"1": [], "5": [], "last": []} for t in THRESHOLDS}
    marked: dict[str, list[list[float]]] = {str(t): [] for t in THRESHOLDS}
    for number, prompt in enumerate(tqdm(SHOWN_PROMPTS, desc="dense", unit="video")):
        with GapRecorder(setting.tokens) as recorder:
            generate(pipe, setting, [prompt], args.seed + number, args.steps, args.guidance)
        gaps = torch.stack(recorder.gaps).unflatten(0, (args.steps, -1))
        for threshold in THRESHOLDS:
            negligible = gaps >= max(-threshold, 1e-6)  # the tile that holds a row's maximum is never marked
            marked[str(threshold)].append(negligible.float().flatten(1).mean(1).tolist())
            for lag, values in kept[str(threshold)].items():
                values += list(_kept(negligible, lag))
    return {
        "tile": [TILE_Q, TILE_K],
        "kept": {t: {lag: _mean(v) if v else None for lag, v in lags.items()} for t, lags in kept.items()},
        "marked_per_step": {t: torch.tensor(v).mean(0).tolist() for t, v in marked.items()},
    }


def _kept(negligible: Tensor, lag: str) -> Iterator[float]:
    """Per step, the share of its negligible tiles that are negligible `lag` steps later as well."""
    steps = len(negligible)
    for step in range(steps - 1):
        later = steps - 1 if lag == "last" else step + int(lag)
        if later < steps and negligible[step].any():
            yield float((negligible[step] & negligible[later]).sum() / negligible[step].sum())


def measure_conditioning(pipe: WanPipeline, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Loss of velocity at several sigmas, given the right prompt, and how much more it is given another one."""
    sampler = VideoSampler("test", torch.Generator().manual_seed(args.seed), pipe.device, setting.frames, setting.side)
    directions = tuple(DIRECTIONS)
    right = [Actor(n % 10, directions[n % 4], SPEEDS[n % 2]) for n in range(args.batch)]
    opposite = {"right": "left", "left": "right", "up": "down", "down": "up"}
    prompts = {
        "right prompt": right,
        "another digit": [replace(a, digit=(a.digit + 5) % 10) for a in right],
        "the opposite direction": [replace(a, direction=opposite[a.direction]) for a in right],
    }
    texts = {name: [format_prompt([a]) for a in actors] for name, actors in prompts.items()}
    texts["no prompt"] = [""] * args.batch
    mean, std = pipe.vae.config.latents_mean[0], pipe.vae.config.latents_std[0]
    latents = (fold(sampler.render([(a,) for a in right])) - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(args.seed)).to(latents)
    result: dict[str, Any] = {}
    for sigma in tqdm(NOISE_LEVELS, desc="noise levels"):
        noisy = torch.lerp(latents, noise, sigma).to(pipe.transformer.dtype)
        loss = {}
        for name, text in texts.items():
            embeds = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)[0]
            timestep = torch.full((args.batch,), 1000 * sigma, device=noisy.device)
            velocity = pipe.transformer(noisy, timestep, embeds, return_dict=False)[0]
            loss[name] = float((velocity.float() - (noise - latents)).square().mean())
        base = loss["right prompt"]
        result[str(sigma)] = {name: value if name == "right prompt" else value - base for name, value in loss.items()}
    return result


JOBS = {
    "prompts": measure_prompts,
    "thresholds": measure_thresholds,
    "coherence": measure_coherence,
    "conditioning": measure_conditioning,
}


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(JOBS))
    parser.add_argument("--weights", type=Path, help="default: the weights that ship with the repository")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--flow-shift", type=float, help="of the noise levels (default: the pipeline's)")
    parser.add_argument("--batch", type=int, default=20, help="samples at once (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=60, help="prompts with two digits (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="use every nth prompt only (default: all)")
    parser.add_argument("--seed", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/moving_digits/evaluation"), help="folder")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # a note about num_frames: see `Setting.num_frames`
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(args.weights, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.flow_shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=args.flow_shift)
    with torch.no_grad():
        result = JOBS[args.what](pipe, setting_of(args.weights), args)
    path = args.output / f"{args.what}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key not in ("runs", "marked_per_step")}
    print(json.dumps(shown, indent=1))
    print(path)


if __name__ == "__main__":
    main()
