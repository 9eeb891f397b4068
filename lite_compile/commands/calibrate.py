"""`liteattention calibrate MODULE:CALLABLE`: thresholds that keep an error budget, for a model of yours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..calibration.attention_error import METRICS
from ..calibration.calibrate import TARGET_ERROR, calibrate
from ..errors import CommandError
from .explain import load_factory

HELP = "Find thresholds by layer and step that keep an error budget, and write them to a file."
RETURNS = "(model, run) or (model, run, prompts)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The factory, the target and the file."""
    parser.add_argument(
        "factory", metavar="MODULE:CALLABLE",
        help=f"called without arguments, it returns {RETURNS}: the denoiser, compiled with backend='liteattention', "
        "and a function that performs one generation, run(prompt) or run(). MODULE is imported from the current folder "
        "or the environment, or is the path of a .py file",
    )  # fmt: skip
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--target-error", type=float, help=f"of a layer's attention output (default: {TARGET_ERROR})")
    target.add_argument("--target-psnr", type=float, help="instead: dB of what run returns against a dense generation")
    target.add_argument("--target-ssim", type=float, help="instead: SSIM of what run returns")
    parser.add_argument("--metric", choices=sorted(METRICS), default="l1", help="of errors (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=int, default=0, metavar="N",
        help="with --target-psnr or --target-ssim: measure the result on the last N prompts instead of using them",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="for example wan.toml; it goes on after a crash")


def run(args: argparse.Namespace) -> int:
    """Calibrate, and print what was reached; exit status 1 if the budget or target is not met everywhere."""
    print(f"making the model: {args.factory}()", file=sys.stderr, flush=True)
    model, generate, prompts = make(args.factory)
    held_out = None
    if args.held_out:
        if not prompts or not 0 < args.held_out < len(prompts):
            raise CommandError(f"--held-out is {args.held_out}; allowed: fewer than the {len(prompts or ())} prompts")
        prompts, held_out = prompts[: -args.held_out], prompts[-args.held_out :]
    try:
        found = calibrate(
            model, generate, args.target_error, args.metric, args.out, prompts=prompts,
            target_psnr=args.target_psnr, target_ssim=args.target_ssim, held_out=held_out,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    print(found)
    met = found.met == 1.0 if found.quality is None else found.quality.met
    return 0 if met else 1


def make(spec: str) -> tuple[nn.Module, Callable[..., Any], Sequence[Any] | None]:
    """Model, run and prompts of the factory."""
    made = load_factory(spec, RETURNS)()
    parts = made if isinstance(made, tuple) else (made,)
    prompts = parts[2] if len(parts) == 3 else None
    if len(parts) not in (2, 3) or not isinstance(parts[0], nn.Module) or not callable(parts[1]):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise CommandError(f"{spec}() returned ({kinds}); allowed: {RETURNS}")
    return parts[0], parts[1], prompts
