"""Generate one video with the small trained model and save what can be seen of its attention.

    python examples/look_inside.py --threshold -3 --layer blocks.1.attn1

Writes density.png, attention.png, errors.png, run.html and run.json; docs/seeing.md shows them. The errors are measured
in a second generation.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from arguments import at_least, blame
from moving_digits.generate import moving_digits_job

import lite_compile


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    job = moving_digits_job(args.prompt, args.steps, 4.0, 0, device, dtype, None)
    model = job.denoisers["transformer"]
    options: dict[str, Any] = {"threshold": args.threshold, "history": True, "probe": True, "must_compute": []}
    job.pipe.transformer = torch.compile(model, backend="liteattention", options=options)

    seconds: list[float] = []
    started = time.perf_counter()

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal started
        job.synchronize()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        return {}

    def generate(**more: Any) -> None:
        job.pipe(**job.arguments, generator=torch.Generator(device).manual_seed(0), **more)

    errors = lite_compile.measure_errors(model, generate)
    with lite_compile.capture_attention(model, args.layer, step=args.steps - 1) as calls:
        started = time.perf_counter()
        generate(callback_on_step_end=on_step_end)

    lite_compile.plot(model, path=args.output / "density.png")
    lite_compile.plot_attention(calls[0], head=args.head, path=args.output / "attention.png")
    lite_compile.plot(errors, path=args.output / "errors.png")
    title = f"Moving digits: {args.prompt}"
    for name in ("run.html", "run.json"):
        lite_compile.save_report(args.output / name, model, title=title, step_seconds=seconds, errors=errors)
    print(lite_compile.stats(model))
    print(f"saved in {args.output}: density.png, attention.png, errors.png, run.html, run.json")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="look_inside", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="3 right and 7 up", help="default: %(default)s")
    parser.add_argument("--steps", type=at_least(2), default=15, help="denoising steps (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=-10.0, help="log2 units, <= 0 (default: %(default)s)")
    parser.add_argument("--layer", default="blocks.1.attn1", help="whose attention to draw (default: %(default)s)")
    parser.add_argument("--head", type=int, choices=range(4), default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("seeing"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    with blame("--threshold", parser):
        lite_compile.Options(threshold=args.threshold)
    with blame("--output", parser):
        args.output.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
