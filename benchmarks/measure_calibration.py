"""Are calibrated error budgets kept on prompts and seeds that calibration has not seen, and are they worth it?

`python benchmarks/measure_calibration.py --weights benchmarks/weights/moving-digits-long.safetensors [--json FILE]`

1. For each target error: calibrate on `--prompts` prompts; on `--seeds` other prompts and seeds, the share of
   the layers' steps within the budget (and within the plain target), density, seconds, PSNR against dense.
2. For `--psnr`: calibrate for that end-to-end target on `--psnr-prompts` prompts (more, as their spread counts), and
   measure it on the same held-out generations.
3. Constant thresholds on the same generations; at equal mean PSNR, how much sparser is calibrated, per seed.

Nothing goes through Inductor, so that what differs is the attention alone. On a CPU: `--side 32
--steps 5 --prompts 1 --seeds 2 --no-times` shows that it works.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from moving_digits.data import VideoSampler, format_prompt
from moving_digits.metrics import psnr
from moving_digits.pipeline import load_pipeline, setting_of
from moving_digits.sampling import generate

import lite_compile
from lite_compile import Schedule
from lite_compile.calibration.budget import Budget, default_share
from lite_compile.calibration.generations import Generations
from lite_compile.calibration.replay import Replay, mean_density
from lite_compile.ops import CRITERIA
from lite_compile.schedule import Thresholds

SHARES = {"default": default_share, "flat": lambda position: 1.0, "falling": lambda position: 1 - 0.75 * position}
Prompt = tuple[str, int]
"""A prompt and its seed."""


def draw_prompts(number: int, seed: int) -> list[Prompt]:
    """Random prompts of one and two digits."""
    sampler = VideoSampler("test", torch.Generator().manual_seed(seed), frames=1, side=8)
    return [(format_prompt(cast), seed + i) for i, cast in enumerate(sampler.draw_casts(number))]


class Measurement:
    """The held-out generations, dense once, and under any thresholds."""

    def __init__(
        self, model: torch.nn.Module, run: Callable[[Prompt], Tensor], held_out: Sequence[Prompt], timed: bool
    ) -> None:
        self._model, self._run, self._held_out, self._timed = model, run, held_out, timed
        self._generations = Generations(model, run, with_prompt=True)
        self._dense = [self._generations.observe(prompt, Replay(None)) for prompt in held_out]

    def rows(self, thresholds: Thresholds, budget: Budget | None) -> dict[str, Any]:
        """PSNR and density of each seed; with a budget, shares of the layers' steps that keep it."""
        found: dict[str, Any] = {"psnr": [], "density": []}
        kept, within, count = 0, 0, 0
        for prompt, dense in zip(self._held_out, self._dense, strict=True):
            replay = Replay(thresholds, None if budget is None else budget.metric)
            video = self._generations.observe(prompt, replay)
            found["psnr"].append(float(psnr(dense, video, (0, 1))))
            found["density"].append(mean_density(replay.densities()))
            for fraction, error in [entry for steps in replay.errors.values() for entry in steps.items()]:
                assert budget is not None
                count += 1
                kept += error <= budget.at(fraction)
                within += error <= budget.target
        if budget is not None:
            found |= {"layer_steps": count, "within_budget": kept / count, "within_target": within / count}
        found |= {"mean_psnr": mean(found["psnr"]), "mean_density": statistics.mean(found["density"])}
        return found | {"seconds": self.seconds(thresholds) if self._timed else math.nan}

    def seconds(self, thresholds: Thresholds) -> float:
        """Of one generation, nothing intercepted; the second of two."""
        lite_compile.set_threshold(self._model, thresholds)
        for _ in range(2):
            synchronize()
            start = time.perf_counter()
            self._run(self._held_out[0])
            synchronize()
        return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mean(values: Sequence[float]) -> float:
    """Of decibels, equal videos counting as 100."""
    return statistics.mean(min(value, 100.0) for value in values)


def compare(calibrated: dict[str, Any], constants: dict[float, dict[str, Any]]) -> dict[str, Any] | None:
    """How much sparser calibrated is than a constant of equal mean PSNR (between two that were measured), per seed."""
    for bold, careful in zip(sorted(constants, reverse=True), sorted(constants, reverse=True)[1:], strict=False):
        low, high = constants[bold]["mean_psnr"], constants[careful]["mean_psnr"]
        if low <= calibrated["mean_psnr"] <= high and high > low:
            weight = (calibrated["mean_psnr"] - low) / (high - low)
            threshold = bold * (1 - weight) + careful * weight
            pairs = zip(constants[bold]["density"], constants[careful]["density"], strict=True)
            constant = [a * (1 - weight) + b * weight for a, b in pairs]
            gains = [a - b for a, b in zip(constant, calibrated["density"], strict=True)]
            spread = statistics.stdev(gains) if len(gains) > 1 else math.nan
            return {
                "constant": threshold, "constant_density": statistics.mean(constant), "gain": statistics.mean(gains),
                "gain_stdev": spread, "seeds_where_sparser": sum(gain > 0 for gain in gains), "seeds": len(gains),
            }  # fmt: skip
    return None


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="default: those that ship with the repository")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=3, help="calibration prompts (default: %(default)s)")
    parser.add_argument("--psnr-prompts", type=int, default=6, help="likewise for --psnr (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="held-out generations (default: %(default)s)")
    parser.add_argument("--targets", type=float, nargs="*", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--constants", type=float, nargs="*", default=[-12.0, -8.0, -6.0, -4.5, -3.0])
    parser.add_argument("--psnr", type=float, nargs="*", default=[25.0, 28.0, 30.0])
    parser.add_argument("--share", choices=SHARES, default="default", help="of the budget along the trajectory")
    parser.add_argument("--criterion", choices=CRITERIA, default="max", help="default: %(default)s")
    parser.add_argument("--no-times", action="store_true", help="leave out the two generations per row that are timed")
    parser.add_argument("--side", type=int, help="pixels of the videos' sides; default: what the model was trained on")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--keep", type=Path, help="write the calibration files into this folder")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    share = SHARES[args.share]
    begin = time.perf_counter()
    setting = setting_of(args.weights)
    setting = replace(setting, side=args.side or setting.side)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    pipe = load_pipeline(args.weights, args.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    options = {"inner": "eager", "min_seq_len": 64, "criterion": args.criterion}
    pipe.transformer = torch.compile(model, backend="liteattention", options=options)

    def run(prompt: Prompt) -> Tensor:
        return generate(pipe, setting, [prompt[0]], prompt[1], args.steps, 4.0)

    def say(name: str, row: dict[str, Any]) -> None:
        shares = f"{row['within_budget']:7.1%} {row['within_target']:7.1%}" if "within_budget" in row else " " * 15
        low, high = min(row["psnr"]), max(row["psnr"])
        print(
            f"{name:>16} {shares} {row['mean_density']:8.3f} {row['seconds']:8.2f} {row['mean_psnr']:6.1f} "
            f"({low:.1f} to {high:.1f})   {time.perf_counter() - begin:6.0f} s so far", flush=True,
        )  # fmt: skip

    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    print(f"{device}, torch {torch.__version__}, {setting.name}: {setting.tokens} tokens, {args.steps} steps, {dtype}")
    print(f"calibrated on {args.prompts} prompts, for PSNR on {args.psnr_prompts}; measured on {args.seeds} others; l1")
    print(f"{'':>16} {'budget':>7} {'target':>7} {'density':>8} {'seconds':>8} {'PSNR':>6}")
    given = draw_prompts(args.prompts, 1)
    record: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "commit": os.environ.get("LITE_COMMIT", "unknown"),
        "setting": setting.name, "tokens": setting.tokens, "dtype": str(dtype), "steps": args.steps,
        "calibration_prompts": given, "share": args.share, "criterion": args.criterion,
    }  # fmt: skip

    def save(**found: Any) -> None:
        """After each row, so that a run that is cut short leaves what it measured."""
        record.update(found, seconds=time.perf_counter() - begin)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    measurement = Measurement(model, run, draw_prompts(args.seeds, 1000), not args.no_times)
    none = measurement.rows(Schedule.constant(-math.inf), None)
    say("-inf", none)
    save(nothing_skipped=none)
    constants = {}
    for threshold in args.constants:
        constants[threshold] = measurement.rows(Schedule.constant(threshold), None)
        say(f"constant {threshold:g}", constants[threshold])
        save(constants=constants)
    calibrated = {}
    for target in args.targets:
        start = time.perf_counter()
        out = args.keep and args.keep / f"{setting.name}-{args.criterion}-l1-{target:g}.toml"
        found = lite_compile.calibrate(model, run, target, prompts=given, share=share, out=out)
        row = {"calibration_seconds": time.perf_counter() - start, "calibration_met": found.met, "cost": found.cost}
        row |= measurement.rows(found.thresholds, found.budget)
        row["against_constant"] = compare(row, constants)
        calibrated[target] = row
        say(f"l1 {target:g}", row)
        save(calibrated=calibrated)
    quality = {}
    for target in args.psnr:
        start = time.perf_counter()
        several = draw_prompts(args.psnr_prompts, 1)
        found = lite_compile.calibrate(model, run, prompts=several, share=share, target_psnr=target, value_range=(0, 1))
        assert found.quality is not None
        row = {"calibration_seconds": time.perf_counter() - start, "prompts": len(several)}
        row |= {"scale": found.quality.scale, "calibration_psnr": found.quality.calibration, "cost": found.cost}
        row |= measurement.rows(found.thresholds, None)
        row["share_met"] = sum(value >= target for value in row["psnr"]) / len(row["psnr"])
        row["against_constant"] = compare(row, constants)
        quality[target] = row
        say(f"PSNR {target:g}", row)
        save(psnr_targets=quality)
        print(f"{'':>16} {row['share_met']:.0%} of the held-out generations reach {target:g} dB")
    for name, row in [(f"l1 {t:g}", r) for t, r in calibrated.items()] + [
        (f"PSNR {t:g}", r) for t, r in quality.items()
    ]:
        found_equal = row["against_constant"]
        if found_equal is None:
            print(f"{name}: no constant that was measured is below and above its PSNR")
            continue
        print(
            f"{name}: density lower by {found_equal['gain']:.4f} +- {found_equal['gain_stdev']:.4f} than constant "
            f"{found_equal['constant']:.1f} of equal mean PSNR ({found_equal['constant_density']:.3f}); sparser on "
            f"{found_equal['seeds_where_sparser']} of {found_equal['seeds']} seeds"
        )


if __name__ == "__main__":
    main()
