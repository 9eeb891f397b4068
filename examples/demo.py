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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_pictures import draw_density, draw_skip_mask, save_frames
from diffusers import DiffusionPipeline
from tiny_wan import random_prompt, tiny_pipeline
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics

import lite_compile
from lite_compile.layer_state import layer_states
from lite_compile.layer_stats import skip_mask

Densities = dict[tuple[str, int], float]
"""Density of the last call per (layer, stream)."""

DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass
class Run:
    """What one generation left behind."""

    latents: Tensor | None = None
    output: Any = None
    step_seconds: list[float] = field(default_factory=list)
    densities: list[Densities] = field(default_factory=list)
    compilations: int = 0
    graph_breaks: int = 0
    recompilations: int = 0

    @property
    def first(self) -> float:
        return self.step_seconds[0]

    @property
    def steady(self) -> float:
        """Median seconds of the steps after the first."""
        return statistics.median(self.step_seconds[1:])


class Job:
    """A pipeline, the arguments of its call, and its uncompiled denoisers by attribute name."""

    def __init__(self, pipe: DiffusionPipeline, arguments: dict[str, Any], device: torch.device) -> None:
        self.pipe, self.arguments, self.device = pipe, arguments, device
        found = {name: getattr(pipe, name, None) for name in DENOISERS}
        self.denoisers: dict[str, nn.Module] = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
        if not self.denoisers:
            raise SystemExit(f"demo: {type(pipe).__name__} has none of {', '.join(DENOISERS)}; nothing to compile")
        self.seed = 0

    def densities(self) -> Densities:
        streams = [s for model in self.denoisers.values() for s in lite_compile.stats(model).streams]
        return {(s.layer, s.stream): s.density for s in streams}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self, title: str, compile_model: Callable[[nn.Module], Any], watch_density: bool = False) -> Run:
        """One generation with freshly compiled denoisers; `title` stands before the progress bar."""
        torch._dynamo.reset()
        counters.clear()
        known_metrics = len(get_compilation_metrics())
        for name, model in self.denoisers.items():
            setattr(self.pipe, name, compile_model(model))
        run, started = Run(), 0.0

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal started
            self.synchronize()
            run.step_seconds.append(time.perf_counter() - started)
            run.latents = tensors["latents"]
            if watch_density:
                run.densities.append(self.densities())
            started = time.perf_counter()
            return {}

        self.pipe.set_progress_bar_config(desc=title)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        started = time.perf_counter()
        run.output = self.pipe(
            **self.arguments, generator=generator, callback_on_step_end=on_step_end, return_dict=False
        )[0]
        for name, model in self.denoisers.items():
            setattr(self.pipe, name, model)
        run.compilations = counters["stats"]["unique_graphs"]
        run.graph_breaks = sum(counters["graph_break"].values())
        run.recompilations = sum(bool(m.recompile_reason) for m in get_compilation_metrics()[known_metrics:])
        return run


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = load_job(args, device) if args.model else tiny_job(args, device)
    describe(job, args)

    print("\n[1/2] Inductor alone", flush=True)
    dense = job.run("Inductor alone", torch.compile)
    print('\n[2/2] backend="liteattention"', flush=True)
    options: dict[str, Any] = {"threshold": args.threshold}
    sparse = job.run(
        "liteattention ", lambda model: torch.compile(model, backend="liteattention", options=options), True
    )
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
    return Job(pipe, {**arguments, "num_inference_steps": args.steps, "output_type": "pil"}, device)


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


def density_table(steps: Sequence[Densities], rows: int = 25, width: int = 40) -> list[str]:
    """One line per step, or `rows` evenly chosen ones: mean, per stream, and a bar."""
    if not steps or not steps[-1]:
        return ["nothing was rewritten; the reasons stand above"]
    streams = sorted({stream for step in steps for _, stream in step})
    lines = [f"step  {'mean':>5}  " + "".join(f"{f'stream {s}':>9}" for s in streams)]
    chosen = range(len(steps)) if len(steps) <= rows else [i * (len(steps) - 1) // (rows - 1) for i in range(rows)]
    for number in chosen:
        step = steps[number]
        per_stream = [[d for (_, stream), d in step.items() if stream == s] for s in streams]
        mean = statistics.fmean(step.values()) if step else 1.0
        cells = "".join(f"{statistics.fmean(d):9.3f}" if d else " " * 9 for d in per_stream)
        lines.append(f"{number + 1:>4}  {mean:5.3f}  {cells}   {'#' * round(mean * width)}")
    return lines


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
