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
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import at_least, blame, finite, positive

from moving_digits.measure_coherence import measure_coherence
from moving_digits.measure_conditioning import measure_conditioning
from moving_digits.measure_prompts import measure_prompts
from moving_digits.measure_thresholds import measure_thresholds
from moving_digits.pipeline import WEIGHTS, load_pipeline, setting_of, sha256
from moving_digits.sampling import Sampling
from moving_digits.train import commit, device_name

JOBS = {
    "prompts": measure_prompts,
    "thresholds": measure_thresholds,
    "coherence": measure_coherence,
    "conditioning": measure_conditioning,
}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    run(args)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(JOBS))
    parser.add_argument("--weights", type=Path, help="default: the weights that ship with the repository")
    parser.add_argument("--steps", type=at_least(2), default=30, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=finite, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--flow-shift", type=positive, help="of the noise levels (default: the pipeline's)")
    parser.add_argument("--batch", type=at_least(1), default=20, help="samples at once (default: %(default)s)")
    parser.add_argument("--pairs", type=at_least(0), default=60, help="prompts with two digits (default: %(default)s)")
    parser.add_argument("--every", type=at_least(1), default=1, help="use every nth prompt only (default: all)")
    parser.add_argument("--seed", type=at_least(0), default=1000, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("build/moving_digits/evaluation"), help="folder")
    args = parser.parse_args(arguments)
    with blame("--weights", parser):
        setting_of(args.weights)
    with blame("--output", parser):
        args.output.mkdir(parents=True, exist_ok=True)
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, write the results, and print most of them."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # a note about num_frames: see `Setting.num_frames`
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(args.weights, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.flow_shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=args.flow_shift)
    how = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    with torch.no_grad():
        result = JOBS[args.what](pipe, setting_of(args.weights), how)
    result["conditions"] = {
        "weights": sha256(args.weights or WEIGHTS / "small.safetensors")[:12], "device": device_name(device),
        "dtype": str(pipe.transformer.dtype), "torch": torch.__version__, "commit": commit(),
        "flow_shift": pipe.scheduler.config.flow_shift, "steps": how.steps, "guidance": how.guidance,
        "seed": how.seed, "batch": how.batch, "every": how.every,
    }  # fmt: skip
    path = args.output / f"{args.what}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key not in ("runs", "marked_per_step")}
    print(json.dumps(shown, indent=1))
    print(path)


if __name__ == "__main__":
    main()
