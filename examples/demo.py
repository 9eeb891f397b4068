"""Run one diffusers pipeline twice, with Inductor alone and with `backend="liteattention"`, and compare.

`make demo` runs it without arguments, on the small trained model of `examples/moving_digits`. A real checkpoint:

    python examples/demo.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A red fox trots through snow"
"""

from __future__ import annotations

import argparse
import copy
import inspect
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import at_least
from demo_pictures import draw_density, draw_skip_mask, save_frames
from diffusers import DiffusionPipeline
from generation import Job, Run, density_table
from moving_digits.data import parse_prompt
from moving_digits.generate import as_video, moving_digits_job
from moving_digits.metrics import psnr, ssim
from moving_digits.pictures import save_gif_grid
from torch import Tensor

import lite_compile
from lite_compile.layer_state import layer_states
from lite_compile.layer_stats import skip_mask

DEFAULT_PROMPT, GUIDANCE = "3 right and 7 up", 4.0


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = load_job(args, device) if args.model else trained_job(args, device)
    describe(job, args)

    print("\n[1/2] Inductor alone", flush=True)
    dense = job.run("inductor")
    print('\n[2/2] backend="liteattention"', flush=True)
    sparse = job.run("liteattention", {"threshold": args.threshold})
    files = save_files(job, dense, sparse, args.output)

    print_section("Attention sites", str(lite_compile.report()))
    print_section("Density: share of the tiles of QK^T that were computed", *density_table(sparse.densities))
    print_section("Difference of the results", *difference_lines(dense, sparse))
    if not args.model:
        compared = as_video(dense.output), as_video(sparse.output)
        print(f"  frames: PSNR {float(psnr(*compared, (0, 1))):.1f} dB, SSIM {float(ssim(*compared, (0, 1))):.4f}")
        print(f"  one model call with threshold=-inf against uncompiled PyTorch: relative L2 {never_skipping(job):.1e}")
    print_section("Time", *time_lines(dense, sparse))
    print_section("Compilation", *compilation_lines(dense, sparse))
    print_section("Files", *map(str, files))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint of a diffusers pipeline: a folder or a Hugging Face name")
    parser.add_argument("--prompt", help=f"what to show (default, without --model: {DEFAULT_PROMPT!r})")
    parser.add_argument("--height", type=at_least(16), help="pixels (default: the pipeline's own)")
    parser.add_argument("--width", type=at_least(16), help="pixels (default: the pipeline's own)")
    parser.add_argument("--frames", type=at_least(1), help="frames of the video (default: the pipeline's own)")
    parser.add_argument("--steps", type=at_least(2), default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=-10.0, help="log2 units, <= 0 (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        lite_compile.Options(threshold=args.threshold)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not args.model:
        for name in ("height", "width", "frames"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} needs --model: the built-in model was trained for one size")
        args.prompt = args.prompt or DEFAULT_PROMPT
        try:
            parse_prompt(args.prompt)
        except ValueError as error:
            parser.error(f"--prompt: {error}")
    elif args.prompt is None:
        parser.error("--model needs --prompt")
    return args


def trained_job(args: argparse.Namespace, device: torch.device) -> Job:
    """The small trained model that ships with the repository."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return moving_digits_job(args.prompt, args.steps, GUIDANCE, 0, device, dtype, None)


def load_job(args: argparse.Namespace, device: torch.device) -> Job:
    """A real checkpoint."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"demo: cannot load --model {args.model!r}: {error}") from error
    accepted = inspect.signature(pipe.__call__).parameters
    if "callback_on_step_end" not in accepted:
        raise SystemExit(f"demo: {type(pipe).__name__} has no callback_on_step_end, which this demo measures with")
    given = {"prompt": args.prompt, "height": args.height, "width": args.width, "num_frames": args.frames}
    arguments = {name: value for name, value in given.items() if value is not None}
    for name in arguments:
        if name not in accepted:
            raise SystemExit(f"demo: {type(pipe).__name__} does not take {name}")
    try:
        return Job(pipe, {**arguments, "num_inference_steps": args.steps, "output_type": "pil"}, device)
    except ValueError as error:
        raise SystemExit(f"demo: {error}") from error


def describe(job: Job, args: argparse.Namespace) -> None:
    """Say what is going to run, and on what."""
    device = torch.cuda.get_device_name() if job.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{type(job.pipe).__name__}, {args.steps} steps, threshold {args.threshold:g}")
    print(f"{device}; torch {torch.__version__}; {next(iter(job.denoisers.values())).dtype}")
    if not args.model:
        print(
            f"\nPrompt {args.prompt!r}. The model is small (9 M parameters, 8 blocks, 4 heads of 64, 4,352 tokens),\n"
            "trained on videos of moving digits: examples/moving_digits/MODEL_CARD.md."
        )


def difference_lines(dense: Run, sparse: Run) -> list[str]:
    assert dense.latents is not None
    assert sparse.latents is not None
    expected, actual = dense.latents.double(), sparse.latents.double()
    return [f"final latents, liteattention against Inductor alone: relative L2 {relative_l2(actual, expected):.1e}"]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def never_skipping(job: Job) -> float:
    """Relative L2 between one call of the model through our op with `threshold=-inf` and the plain model."""
    torch._dynamo.reset()
    model: Any = copy.deepcopy(job.denoisers["transformer"])
    embeds, _ = job.pipe.encode_prompt(job.arguments["prompt"], do_classifier_free_guidance=False)
    size = job.arguments["height"] // job.pipe.vae_scale_factor_spatial
    shape = (1, model.config.in_channels, job.arguments["num_frames"] + 1, size, size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(job.device, model.dtype)
    call = {
        "hidden_states": noise, "timestep": torch.tensor([500.0], device=job.device),
        "encoder_hidden_states": embeds.to(model.dtype), "return_dict": False,
    }  # fmt: skip
    options: dict[str, Any] = {"threshold": -float("inf"), "inner": "eager"}
    compiled: Any = torch.compile(model, backend="liteattention", options=options)
    with lite_compile.generation(model):
        through_op = compiled(**call)[0]
    return relative_l2(through_op.double(), model(**call)[0].double())


def time_lines(dense: Run, sparse: Run) -> list[str]:
    def row(name: str, run: Run) -> str:
        last = statistics.fmean(run.step_seconds[-3:])
        return f"{name:<16}{run.first:>20.2f}{run.steady:>20.3f}{last:>20.3f}"

    header = f"{'seconds':<16}{'first, compiling':>20}{'median of the rest':>20}{'mean of last three':>20}"
    ratio = dense.steady / sparse.steady
    return [
        header,
        row("Inductor alone", dense),
        row("liteattention", sparse),
        f"Inductor alone / liteattention, median step: {ratio:.2f}",
        "(do not compare the first steps: the second run finds caches that the first one filled)",
    ]


def compilation_lines(dense: Run, sparse: Run) -> list[str]:
    return [
        f"{name:<16}{run.compilations} compiled, {run.graph_breaks} graph breaks, {run.recompilations} recompilations"
        for name, run in (("Inductor alone", dense), ("liteattention", sparse))
    ]


def save_files(job: Job, dense: Run, sparse: Run, folder: Path) -> list[Path]:
    """Pictures, and what the pipeline generated where it has a decoder."""
    files = []
    if sparse.densities and sparse.densities[-1]:
        files.append(draw_density(sparse.densities, folder / "density.png"))
        (layer, stream), _ = min(sparse.densities[-1].items(), key=lambda item: item[1])
        files.append(draw_mask_of(job, layer, stream, folder / "skip_mask.png"))
    if job.arguments["output_type"] == "np":
        files.append(
            save_gif_grid(
                [[as_video(run.output) for run in (dense, sparse)]],
                ["Inductor alone", "liteattention"],
                folder / "videos.gif",
                scale=4,
            )
        )
    else:
        for name, run in (("inductor", dense), ("liteattention", sparse)):
            files.append(save_frames(run.output, folder / name))
    return files


def draw_mask_of(job: Job, layer: str, stream: int, path: Path) -> Path:
    """The skip mask that `layer` ended with."""
    states = (state for model in job.denoisers.values() for state in layer_states(model) if state.layer == layer)
    state = max(states, key=lambda s: int(skip_mask(s, stream).sum()))
    return draw_skip_mask(skip_mask(state, stream)[0], f"{layer}, stream {stream}", tuple(state.spec.tile), path)


def print_section(title: str, *lines: str) -> None:
    print(f"\n{title}")
    for line in "\n".join(lines).splitlines():
        print(f"  {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
