"""Generate a video from a prompt and save it as an animated GIF.

    python examples/moving_digits/generate.py --prompt "3 right" --backend liteattention
    python examples/moving_digits/generate.py --prompt "7 up fast and 2 left" --backend inductor liteattention

Prompts are `<digit> <right|left|up|down> [slow|fast]`, two of them joined by "and". With several backends, each is
compared with the first.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import at_least, blame, finite
from generation import BACKENDS, Job, density_table

import lite_compile
from moving_digits.data import format_prompt, parse_prompt
from moving_digits.metrics import psnr, ssim
from moving_digits.pictures import save_gif
from moving_digits.pipeline import load_pipeline, setting_of


def moving_digits_job(
    prompt: str, steps: int, guidance: float, seed: int, device: torch.device, dtype: torch.dtype, weights: Path | None
) -> Job:
    """A pipeline on `device` and the arguments of its call."""
    pipe = load_pipeline(weights, device, dtype)
    setting = setting_of(weights)
    arguments: dict[str, Any] = {
        "prompt": prompt, "height": setting.side, "width": setting.side, "num_frames": setting.num_frames,
        "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np",
    }  # fmt: skip
    job = Job(pipe, arguments, device)
    job.seed = seed
    return job


def as_video(output: Any) -> Tensor:
    """`[3, F, H, W]` in 0..1 from a pipeline's numpy output of one video."""
    return torch.as_tensor(output[0]).float().permute(3, 0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # a note about num_frames: see `Setting.num_frames`
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    job = moving_digits_job(args.prompt, args.steps, args.guidance, args.seed, device, dtype, args.weights)
    videos: dict[str, Tensor] = {}
    for backend in args.backend:
        started = time.perf_counter()
        run = job.run(backend, {"threshold": args.threshold} if backend == "liteattention" else None)
        seconds = time.perf_counter() - started
        videos[backend] = as_video(run.output)
        name = args.prompt.replace(" ", "-")
        path = save_gif(videos[backend], args.output / f"{name}-{args.seed}-{backend}.gif")
        print(f"{backend}: {seconds:.1f} s, compilation included; {run.steady:.3f} s per step (median)")
        if backend == "liteattention":
            print("\n".join(f"  {line}" for line in density_table(run.densities)))
        print(f"  {path}")
    reference, *others = args.backend
    for backend in others:
        difference = float(psnr(videos[reference], videos[backend], (0, 1)))
        shown = "identical" if math.isinf(difference) else f"PSNR {difference:.2f} dB"
        similarity = float(ssim(videos[reference], videos[backend], (0, 1)))
        print(f"{backend} against {reference}: {shown}, SSIM {similarity:.4f}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="3 right", help="default: %(default)s")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["liteattention"], help="one or several")
    parser.add_argument("--steps", type=at_least(2), default=30, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=finite, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: %(default)s")
    parser.add_argument(
        "--threshold", type=float, default=-10.0, help="log2 units, <= 0; =-inf for none (default: %(default)s)"
    )
    parser.add_argument("--weights", type=Path, help="default: the weights that ship with the repository")
    parser.add_argument("--output", type=Path, default=Path("generated"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    with blame("--threshold", parser):
        lite_compile.Options(threshold=args.threshold)
    with blame("--prompt", parser):
        args.prompt = format_prompt(parse_prompt(args.prompt))
    with blame("--weights", parser):
        setting_of(args.weights)
    with blame("--output", parser):
        args.output.mkdir(parents=True, exist_ok=True)
    if len(set(args.backend)) < len(args.backend):
        parser.error(f"argument --backend: each at most once, not {' '.join(args.backend)}")
    return args


if __name__ == "__main__":
    main()
