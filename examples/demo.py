"""Run one diffusers pipeline twice, with Inductor alone and with `backend="liteattention"`, and compare.

`make demo` runs it without arguments, on a tiny random model. A real checkpoint:

    python examples/demo.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A red fox trots through snow"
"""

from __future__ import annotations

import argparse
import inspect
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_pictures import draw_density, draw_skip_mask, save_frames
from diffusers import DiffusionPipeline
from generation import Job, Run, density_table
from tiny_wan import random_prompt, tiny_pipeline
from torch import Tensor

import lite_compile
from lite_compile.layer_state import layer_states
from lite_compile.layer_stats import skip_mask


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = load_job(args, device) if args.model else tiny_job(args, device)
    describe(job, args)

    print("\n[1/2] Inductor alone", flush=True)
    dense = job.run("inductor")
    print('\n[2/2] backend="liteattention"', flush=True)
    sparse = job.run("liteattention", {"threshold": args.threshold})
    files = save_files(job, dense, sparse, args.output)

    print_section("Attention sites", str(lite_compile.report()))
    print_section("Density: share of the tiles of QK^T that were computed", *density_table(sparse.densities))
    print_section("Difference of the final latents", *difference_lines(dense, sparse))
    if not args.model:
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
    parser.add_argument("--prompt", help="what the checkpoint shall show")
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
        for name in ("prompt", "height", "width", "frames"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} needs --model: the tiny built-in model has neither text encoder nor VAE")
    elif args.prompt is None:
        parser.error("--model needs --prompt")
    return args


def at_least(minimum: int) -> Callable[[str], int]:
    """argparse type: an integer from `minimum` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {minimum}")
        return value

    return parse


def tiny_job(args: argparse.Namespace, device: torch.device) -> Job:
    """The tiny random model on 4,096 tokens."""
    pipe = tiny_pipeline().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    arguments = {
        "prompt_embeds": random_prompt(1).to(device), "negative_prompt_embeds": random_prompt(2).to(device),
        "height": 256, "width": 256, "num_frames": 61, "num_inference_steps": args.steps, "output_type": "latent",
    }  # fmt: skip
    return Job(pipe, arguments, device)


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
            "\nThe model is tiny and random, not trained: 3 blocks, 4 heads of 64, 4,096 tokens (16 x 16 x 16). Its\n"
            "attention is made peaked by hand, and ever more so towards the last step (examples/tiny_wan.py), so that\n"
            "it is sparse at all. What you see is the machinery at work, not the quality or the speed of a video model."
        )


def difference_lines(dense: Run, sparse: Run) -> list[str]:
    assert dense.latents is not None
    assert sparse.latents is not None
    expected, actual = dense.latents.double(), sparse.latents.double()
    mse = (actual - expected).square().mean()
    psnr = 10 * torch.log10((expected.max() - expected.min()).square() / mse)
    return [
        f"liteattention against Inductor alone: relative L2 {relative_l2(actual, expected):.1e}, PSNR {psnr:.1f} dB"
    ]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def never_skipping(job: Job) -> float:
    """Relative L2 between one call of the tiny model through our op with `threshold=-inf` and the plain model."""
    torch._dynamo.reset()
    model: Any = job.denoisers["transformer"]
    options: dict[str, Any] = {"threshold": -float("inf"), "inner": "eager"}
    shape = (1, model.config.in_channels, 16, 32, 32)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(job.device, model.dtype)
    call = {
        "hidden_states": noise, "timestep": torch.tensor([500.0], device=job.device),
        "encoder_hidden_states": job.arguments["prompt_embeds"].to(model.dtype), "return_dict": False,
    }  # fmt: skip
    compiled: Any = torch.compile(job.denoisers["transformer"], backend="liteattention", options=options)
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
    if job.arguments["output_type"] != "latent":
        for name, run in (("inductor", dense), ("liteattention", sparse)):
            files.append(save_frames(run.output, folder / name))
    return files


def draw_mask_of(job: Job, layer: str, stream: int, path: Path) -> Path:
    """The skip mask that `layer` ended with."""
    states = [state for model in job.denoisers.values() for state in layer_states(model) if state.layer == layer]
    state = max(states, key=lambda s: int(skip_mask(s, stream).sum()))  # the check with threshold=-inf left one without
    return draw_skip_mask(skip_mask(state, stream)[0], f"{layer}, stream {stream}", tuple(state.spec.tile), path)


def print_section(title: str, *lines: str) -> None:
    print(f"\n{title}")
    for line in "\n".join(lines).splitlines():
        print(f"  {line}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
