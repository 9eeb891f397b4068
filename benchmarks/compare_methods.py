"""LiteAttention against other sparse attention at equal density, on the trained model of examples/moving_digits.

    python benchmarks/compare_methods.py --steps 8 --prompts 1 --json FILE
    python benchmarks/compare_methods.py --device cuda --setting long --json FILE

For each density, the threshold of LiteAttention's criterion "max" is sought; all other methods are brought to the
density it really had, over all videos and steps. All run through the same kernel with the same tiles, uncompiled but
for the rewrite, and are compared with dense videos of the same seeds. `make bench-doc` writes the tables of
docs/fidelity.md from the JSON in benchmarks/results/fidelity-*.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from arguments import at_least, blame, existing_file, finite, usable_device
from fidelity_metrics import judge
from fidelity_runs import OTHERS, Comparison, LiteMethod, Videos, lite_methods
from match_density import DensityCurve
from moving_digits.data import DIRECTIONS, SPEEDS, Actor, format_prompt
from moving_digits.metrics import load_classifier
from moving_digits.pipeline import SETTINGS, load_pipeline
from moving_digits.train import commit, device_name

import lite_compile
from lite_compile.calibration.calibration_file import CalibratedThresholds

WEIGHTS = {"small": None, "long": Path(__file__).parent / "weights" / "moving-digits-long.safetensors"}


def compare(
    comparison: Comparison, densities: Sequence[float], dense_shares: Sequence[float], calibrations: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    """One row per method and density, as they are found."""
    classifier = load_classifier(device=comparison.pipe.device)
    methods = lite_methods()
    progress = tqdm(desc="methods", unit="row")

    def row(group: float, name: str, made: Videos, **details: Any) -> dict[str, Any]:
        progress.update()
        progress.set_postfix_str(f"{name} {made.density:.3f}")
        found = judge(made.videos, dense.videos, comparison.prompts, classifier)
        return {"group": group, "method": name, "density": made.density, "seconds": made.seconds} | details | found

    dense = comparison.dense()
    yield row(1.0, "dense", dense)
    measures: dict[str, Callable[[Any], Videos]] = {}
    curves: dict[str, DensityCurve[Videos]] = {}
    for method in methods:
        key = json.dumps(method.options, sort_keys=True)
        if key not in measures:
            measures[key] = comparison.lite(method.options)
        curves[method.name] = curve(method, measures[key])
    yield row(1.0, "nothing skipped", measures["{}"](-float("inf")))
    targets: list[tuple[float, tuple[str, Videos] | None]] = [(density, None) for density in densities]
    for path in calibrations:
        criterion = read_criterion(path)
        options = {} if criterion == "max" else {"criterion": criterion}
        calibrated = measures[json.dumps(options)](path)
        targets.append((calibrated.density, (f"{criterion}, calibrated", calibrated)))
    for target, of_file in targets:
        group = target
        for number, method in enumerate(methods):
            parameter, made = curves[method.name].find(group)
            if number == 0 and of_file is None:
                group = made.density
            yield row(target, method.name, made, threshold=parameter)
        if of_file is not None:
            yield row(target, *of_file)
        for name in OTHERS:
            for dense_share in dense_shares:
                if comparison.density_of_mask(group, dense_share) <= 0:
                    progress.write(f"{name}: its dense steps alone are more than a density of {group:.3f}")
                    continue
                made, details = comparison.other(name, group, dense_share)
                yield row(target, name, made, **details)
    progress.close()


def read_criterion(path: Path) -> str:
    """What the thresholds of a calibration file are compared with."""
    thresholds = lite_compile.Options(threshold=path).thresholds
    assert isinstance(thresholds, CalibratedThresholds)
    return thresholds.criterion


def curve(method: LiteMethod, measure: Callable[[Any], Videos]) -> DensityCurve[Videos]:
    """Density of a method against the number that its threshold follows."""
    return DensityCurve(lambda x: measure(method.threshold(x)), lowest=-24.0, highest=-0.05, first=method.first)


def chosen_prompts(count: int) -> list[str]:
    """Digits, directions and speeds in turn; every fourth prompt has two digits."""
    ways = list(DIRECTIONS)

    def actor(number: int) -> Actor:
        return Actor(3 * number % 10, ways[number % len(ways)], SPEEDS[number // 2 % 2])

    casts = [[actor(n), actor(n + 1)] if n % 4 == 3 else [actor(n)] for n in range(count)]
    return [format_prompt(cast) for cast in casts]


def share(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    value = finite(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to below 1")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=usable_device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="small", help="default: %(default)s")
    parser.add_argument("--prompts", type=at_least(1), default=8, help="so many (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="of each prompt (default: %(default)s)")
    parser.add_argument("--steps", type=at_least(2), default=30, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=finite, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=8, help="videos at once (default: %(default)s)")
    parser.add_argument("--densities", type=share, nargs="*", default=[0.9, 0.8, 0.6], help="default: %(default)s")
    parser.add_argument(
        "--dense-shares", type=share, nargs="+", default=[0.25, 0.0],
        help="shares of the steps that the other methods compute in full first (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=existing_file, nargs="+", default=[], metavar="FILE",
        help="files of lite_compile.calibrate for this model: a group of rows each, at the density of the file",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    for density in args.densities:
        steps = max(round(dense * args.steps) for dense in args.dense_shares)
        if density <= steps / args.steps:
            parser.error(
                f"argument --densities: {density:g} is no more than {steps} dense steps of {args.steps} alone are"
            )
    for path in args.calibration:
        with blame("--calibration", parser):
            lite_compile.Options(threshold=path)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # a note about num_frames: see `Setting.num_frames`
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    pipe = load_pipeline(WEIGHTS[args.setting], args.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts, started = chosen_prompts(args.prompts), time.perf_counter()
    setting = SETTINGS[args.setting]
    comparison = Comparison(pipe, setting, prompts, range(args.seeds), args.steps, args.guidance, args.batch)
    rows: list[dict[str, Any]] = []
    result = {
        "setting": args.setting, "tokens": setting.tokens, "prompts": prompts, "seeds": args.seeds,
        "steps": args.steps, "guidance": args.guidance, "batch": args.batch, "device": device_name(args.device),
        "dtype": str(dtype).removeprefix("torch."), "kernel": comparison.kernel.name, "tile": comparison.kernel.tile,
        "torch": torch.__version__, "commit": commit(), "rows": rows,
    }  # fmt: skip
    with torch.no_grad():
        for row in compare(comparison, args.densities, args.dense_shares, args.calibration):
            rows.append(row)
            result["minutes"] = (time.perf_counter() - started) / 60
            if args.json is not None:  # after each row: a run that is cut off leaves what it has
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        near = "equal" if row["psnr_mean"] is None else f"{row['psnr_mean']:.1f} dB, worst {row['psnr_worst']:.1f}"
        said = f"density {row['density']:.3f}  PSNR {near}  SSIM {row['ssim_mean']:.4f}"
        print(f"{row['group']:.2f} {row['method']:<18} {said}")


if __name__ == "__main__":
    main()
