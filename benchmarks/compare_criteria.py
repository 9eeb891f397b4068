"""Compare criterion="max" with "mass" on the trained model: density against error, and density at equal error.

    python benchmarks/compare_criteria.py --json FILE

Two measurements for each threshold of each criterion. *attention*: on the trajectory of a dense generation each
self-attention is computed a second time with a skip mask that lives on from step to step; relative error of its output,
and the softmax mass that its rows lose. *latents*: whole generations, final latents against those of a dense one.

By default a GPU measures the long setting (16,640 tokens, 30 steps, 4 prompts), a CPU the small one (4,352 tokens, 6
steps, 1 prompt, every second layer: some ten minutes on two quiet cores).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from moving_digits.pipeline import WEIGHTS, Setting, load_pipeline, setting_of, sha256
from moving_digits.sampling import SHOWN_PROMPTS, mean
from moving_digits.train import commit, device_name

import lite_compile
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.ops import NOW_WORDS
from lite_compile.skip_state import COMPUTED_WORD, state_shape, tile_count

LONG = Path(__file__).parent / "weights" / "moving-digits-long.safetensors"
SWEEP = {"max": (-10.0, -6.0, -4.0, -3.0, -2.0), "mass": (-10.0, -6.0, -4.0, -2.0, 0.0)}
EQUAL_ERRORS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""Relative errors of attention outputs at which densities are compared."""
EQUAL_PSNR = (60.0, 50.0, 45.0, 40.0, 35.0, 30.0)
"""dB, of final latents."""


class Variant(NamedTuple):
    """What is compared."""

    criterion: str
    threshold: float


class Replay(TorchFunctionMode):
    """While active, computes each self-attention again per variant, on masks of its own per layer and stream.

    `rows` holds one dict per self-attention and variant. A mask is one generation's: make a new one for the next.
    """

    def __init__(self, setting: Setting, variants: Sequence[Variant], streams: int, every: int) -> None:
        """`every`: layers 0, `every`, 2 * `every`, ... are computed again."""
        super().__init__()
        self.setting, self.variants, self.streams, self.every = setting, variants, streams, every
        self.calls = 0
        self.states: dict[tuple[int, int, Variant], Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            q, k, v = (named[name] for name in ("query", "key", "value"))
            if q.shape[2] == k.shape[2] == self.setting.tokens:
                self._replay(q, k, v)
        return func(*args, **kwargs)

    def _replay(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        layer, call = self.calls % self.setting.layers, self.calls // self.setting.layers
        self.calls += 1
        if layer % self.every:
            return
        step, stream = divmod(call, self.streams)
        kernel = select_kernel(q.device, q.dtype, q.shape[3])
        assert isinstance(kernel, Kernel), kernel
        shape = state_shape(1, q.shape[0], q.shape[1], q.shape[2], k.shape[2], kernel.tile)
        unused = torch.zeros(shape, dtype=torch.int32, device=q.device)
        dense, whole = attend(q, k, v, unused, -1, Variant("max", -math.inf), kernel)
        for variant in self.variants:
            state = self.states.setdefault((layer, stream, variant), torch.zeros_like(unused))
            out, kept = attend(q, k, v, state, 0, variant, kernel)
            dropped = -torch.expm1(kept - whole)
            tiles = state[..., COMPUTED_WORD].numel() * tile_count(k.shape[2], kernel.tile.k)
            self.rows.append(
                {
                    **variant._asdict(), "layer": layer, "stream": stream, "step": step,
                    "density": state[..., COMPUTED_WORD].sum().item() / tiles,
                    "error": ((out - dense).float().norm() / dense.float().norm()).item(),
                    "dropped_mean": dropped.mean().item(), "dropped_max": dropped.max().item(),
                }
            )  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slot: int, variant: Variant, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """One call of the op: output, and natural-log sum of exponentials `[B, H, Sq]`."""
    now = torch.zeros(NOW_WORDS, dtype=torch.int32, device=q.device)
    now[0], now[2] = 1, slot
    threshold = torch.tensor(variant.threshold, device=q.device)
    given = (q, k, v, state, now, q.shape[3] ** -0.5, threshold, *kernel.tile, True, True)
    name = "triton" if kernel.name == "cpu" else kernel.name
    out, lse = torch.ops.lite_compile.attend(*given, kernel_name=name, criterion=variant.criterion)
    return out, lse


def final_latents(pipe: WanPipeline, setting: Setting, prompt: str, args: argparse.Namespace, seed: int) -> Tensor:
    """`[1, C, F, H, W]`, float32 on the CPU."""
    latents = pipe(
        prompt=[prompt], height=setting.side, width=setting.side, num_frames=setting.num_frames,
        num_inference_steps=args.steps, guidance_scale=args.guidance, output_type="latent", return_dict=False,
        generator=torch.Generator(pipe.device).manual_seed(seed),
    )[0]  # fmt: skip
    return latents.float().cpu()


def measure_attention(
    pipe: WanPipeline, setting: Setting, variants: Sequence[Variant], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Per variant: means over prompts, layers, streams and the steps that a mask can serve (all but the first)."""
    rows: list[dict[str, Any]] = []
    pipe.set_progress_bar_config(desc="attention, dense trajectory", unit="step")
    for number, prompt in enumerate(SHOWN_PROMPTS[: args.prompts]):
        with Replay(setting, variants, 2 if args.guidance > 1 else 1, args.every) as replay:
            final_latents(pipe, setting, prompt, args, args.seed + number)
        rows += [row for row in replay.rows if row["step"]]
    results = []
    for variant in variants:
        own = [row for row in rows if (row["criterion"], row["threshold"]) == variant]
        last = [row for row in own if row["step"] == args.steps - 1]
        results.append(
            {
                **variant._asdict(),
                **{key: mean(row[key] for row in own) for key in ("density", "error", "dropped_mean")},
                "dropped_max": max(row["dropped_max"] for row in own),
                "last_step": {key: mean(row[key] for row in last) for key in ("density", "error", "dropped_mean")},
            }
        )
    return results


def measure_latents(
    pipe: WanPipeline, setting: Setting, variants: Sequence[Variant], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Per variant: density over whole generations, PSNR of the final latents over the range of the dense ones."""
    pipe.set_progress_bar_config(disable=True)
    prompts, model = SHOWN_PROMPTS[: args.prompts], pipe.transformer
    dense = [final_latents(pipe, setting, prompt, args, args.seed + i) for i, prompt in enumerate(prompts)]
    results = []
    for variant in tqdm((Variant("max", -math.inf), *variants), desc="latents", unit="variant"):
        torch._dynamo.reset()
        fresh = copy.deepcopy(model)
        options = {**variant._asdict(), "inner": "eager", "history": True, "min_seq_len": 1}
        pipe.transformer = torch.compile(fresh, backend="liteattention", options=options)
        found = []
        for number, prompt in enumerate(prompts):
            latents = final_latents(pipe, setting, prompt, args, args.seed + number)
            histories = [stream.history for stream in lite_compile.stats(fresh).streams]
            error = (latents - dense[number]).square().mean()
            span = dense[number].max() - dense[number].min()
            found.append((mean(mean(h) for h in histories if h), float(10 * torch.log10(span**2 / error))))
        density, psnr = (mean(values) for values in zip(*found, strict=True))
        results.append({**variant._asdict(), "density": density, "psnr": psnr})
    pipe.transformer = model
    return results


def density_at(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Density at which a curve of (error, density) reaches an error, straight between points; None outside of them."""
    ordered = sorted(points)
    for (low, above), (high, below) in itertools.pairwise(ordered):
        if low <= wanted <= high:
            return above + (below - above) * (wanted - low) / (high - low) if high > low else below
    return None


def compare(results: Sequence[dict[str, Any]], key: str, levels: Sequence[float], log: bool) -> list[dict[str, Any]]:
    """Density of each criterion at equal errors; those that a criterion does not reach are None."""
    curves = {
        name: [(math.log(row[key]) if log else row[key], row["density"]) for row in results
               if row["criterion"] == name and row[key] > 0 and math.isfinite(row["threshold"])]
        for name in SWEEP
    }  # fmt: skip
    return [
        {key: level, **{name: density_at(curve, math.log(level) if log else level) for name, curve in curves.items()}}
        for level in levels
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    names = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    lines = [names, ["---"] * len(names)]
    lines += [[f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=LONG if gpu else None, help="default: see above")
    parser.add_argument("--steps", type=int, default=30 if gpu else 6, help="denoising steps (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=4 if gpu else 1, choices=range(1, len(SHOWN_PROMPTS) + 1))
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--max", type=float, nargs="+", default=SWEEP["max"], help="thresholds of the criterion")
    parser.add_argument("--mass", type=float, nargs="+", default=SWEEP["mass"], help="thresholds of the criterion")
    parser.add_argument(
        "--every", type=int, default=1 if gpu else 2, help="nth layer: attention (default: %(default)s)"
    )
    parser.add_argument("--only", choices=("attention", "latents"), help="one of the two measurements")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error("--steps: a mask is used from the second step on")
    return args


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_pipeline(args.weights, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    setting = setting_of(args.weights)
    variants = [Variant(name, threshold) for name in SWEEP for threshold in getattr(args, name)]
    kernel = select_kernel(device, pipe.transformer.dtype, setting.head_dim)
    assert isinstance(kernel, Kernel), kernel
    result: dict[str, Any] = {
        "conditions": {
            "weights": sha256(args.weights or WEIGHTS / "small.safetensors")[:12], "tokens": setting.tokens,
            "device": device_name(device), "dtype": str(pipe.transformer.dtype), "torch": torch.__version__,
            "commit": commit(), "kernel": kernel.name, "tile": list(kernel.tile), "steps": args.steps,
            "guidance": args.guidance, "every_nth_layer": args.every,
            "seed": args.seed, "prompts": SHOWN_PROMPTS[: args.prompts],
        }
    }  # fmt: skip
    print(result["conditions"])
    if args.only != "latents":
        result["attention"] = measure_attention(pipe, setting, variants, args)
        result["attention_at_equal_error"] = compare(result["attention"], "error", EQUAL_ERRORS, log=True)
    if args.only != "attention":
        result["latents"] = measure_latents(pipe, setting, variants, args)
        result["latents_at_equal_psnr"] = compare(result["latents"], "psnr", EQUAL_PSNR, log=False)
    for name, rows in result.items():
        if name != "conditions":
            print(f"\n{name.replace('_', ' ')}\n\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{args.json}")


if __name__ == "__main__":
    main()
