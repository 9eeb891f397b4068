"""Train the moving-digits video model by flow matching; run it again with the same folder and it goes on.

    python examples/moving_digits/train.py                            # the shipped setting, about 20 minutes on an H200
    python examples/moving_digits/train.py --setting long --init examples/moving_digits/weights/small.safetensors

writes into `--output`: `checkpoint.pt` (to resume), `log.csv` (loss against step) and `<setting>.safetensors`, the
exponential moving average of the weights, which `load_pipeline` reads.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import UMT5EncoderModel

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import at_least, blame, existing_file, finite, positive, usable_device

from moving_digits.data import DIRECTIONS, SPEEDS, Actor, VideoSampler, format_prompt, load_digits
from moving_digits.identity_vae import LATENT_CHANNELS, fold
from moving_digits.pipeline import SETTINGS, Setting, build_transformer, copy_weights, save_weights, setting_of, sha256
from moving_digits.prompt_encoder import encode, text_encoder, tokenizer

HELD_OUT = {(digit, tuple(DIRECTIONS)[digit % 4], SPEEDS[digit % 2]) for digit in range(10)}
"""Combinations of digit, direction and speed that no training prompt has."""
PROMPT_DROPOUT = 0.12
"""Share of the prompts replaced by the empty one, for classifier-free guidance."""
PROMPT_LENGTH = 512
"""WanPipeline's default; what follows the prompt's own tokens is zeros, which count as keys in its cross-attention."""
STATISTICS_VIDEOS = 256
LOG_EVERY, SAVE_EVERY = 50, 500
"""Steps."""


@dataclass(frozen=True)
class Recipe:
    """What decides the result, together with the seed."""

    steps: int
    batch: int
    noise_mean: float = 4.2
    """Of log(sigma / (1 - sigma)), which is normally distributed. Direction is decided at about 4.4: sigma = 0.988."""
    noise_std: float = 1.5
    matrix_rate: float = 4e-3
    """Learning rate of Muon, for the matrices of the blocks."""
    other_rate: float = 1.5e-3
    """Learning rate of AdamW, for everything else."""
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.5
    """Last share of the steps, over which the rates fall to zero."""
    ema: float = 0.9993
    clip: float = 1.0


RECIPES = {
    "small": Recipe(steps=5000, batch=48),
    "long": Recipe(steps=1500, batch=12, matrix_rate=1e-3, other_rate=4e-4),
}


class Trainee(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.transformer: WanTransformer3DModel = build_transformer(setting)
        self.text_encoder: UMT5EncoderModel = text_encoder(setting.text_dim)


class Training:
    """All that a checkpoint holds, and one step of it."""

    def __init__(
        self, setting: Setting, recipe: Recipe, seed: int, device: torch.device, digits: Path | None,
        init: Path | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.setting, self.recipe, self.seed, self.device = setting, recipe, seed, device
        self.model = Trainee(setting)
        if init:
            copy_weights(init, self.model.transformer, self.model.text_encoder)
        self.origin: dict[str, Any] = {
            "setting": setting.name, "recipe": asdict(recipe), "seed": seed, "device": device.type,
            "init": sha256(init) if init else "random weights",
        }  # fmt: skip
        self.model.to(device)
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.optimizers = make_optimizers(self.model, recipe)
        self.tokenizer = tokenizer()
        self.draw = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.sampler = VideoSampler("train", self.draw, device, setting.frames, setting.side, digits)
        self.mean, self.std = latent_statistics(setting, device, digits)
        self.step, self.seconds = 0, 0.0
        self.predict: Any = self.model.transformer
        if device.type == "cuda":
            self.predict = torch.compile(self.model.transformer)

    def batch(self) -> tuple[Tensor, list[str]]:
        """Normalised latents `[B, 12, F, H / 2, W / 2]` and prompts, some of them empty."""
        casts = withhold(self.sampler.draw_casts(self.recipe.batch))
        latents = (fold(self.sampler.render(casts)) - self.mean) / self.std
        kept = torch.rand(len(casts), generator=self.draw) >= PROMPT_DROPOUT
        return latents, [format_prompt(cast) if keep else "" for cast, keep in zip(casts, kept.tolist(), strict=True)]

    def train_step(self) -> Tensor:
        """One optimiser step; its loss, still on the device."""
        self.model.train()
        set_rates(self.optimizers, rate_factor(self.step, self.recipe))
        latents, prompts = self.batch()
        level = torch.randn(len(prompts), generator=self.noise, device=self.device)
        sigma = (self.recipe.noise_mean + self.recipe.noise_std * level).sigmoid()
        noise = torch.randn(latents.shape, generator=self.noise, device=self.device)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            embeds = encode(prompts, self.tokenizer, self.model.text_encoder, PROMPT_LENGTH)
            velocity = self.predict(noisy, sigma * 1000, embeds, return_dict=False)[0]
        loss: Tensor = (velocity.float() - (noise - latents)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # Early on the average would otherwise remember the initial weights for long.
        keep = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.model.parameters()], 1 - keep)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {
            "origin": self.origin, "step": self.step, "seconds": self.seconds,
            "model": self.model.state_dict(), "ema": self.ema, "draw": self.draw.get_state(),
            "noise": self.noise.get_state(), "optimizers": [o.state_dict() for o in self.optimizers],
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        for what, mine in self.origin.items():
            theirs = state["origin"][what]
            if theirs != mine:
                raise SystemExit(
                    f"train: the checkpoint was made with {what} {theirs}, not {mine}; name another --output"
                )
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for mine, saved in zip(self.ema, state["ema"], strict=True):
            mine.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.draw.set_state(state["draw"].cpu())
        self.noise.set_state(state["noise"].cpu())

    def save_average(self, path: Path) -> None:
        """Weights of the moving average, as `load_pipeline` reads them."""
        with averaged(self.model, self.ema):
            metadata = {
                "setting": self.setting.name, "latents_mean": json.dumps([self.mean] * LATENT_CHANNELS),
                "latents_std": json.dumps([self.std] * LATENT_CHANNELS), "seed": str(self.seed),
                "steps": str(self.step), "batch": str(self.recipe.batch), "recipe": str(self.recipe),
                "init": self.origin["init"], "seconds": f"{self.seconds:.0f}", "device": device_name(self.device),
                "commit": commit(), "torch": str(torch.__version__), "licence": "Apache-2.0",
            }  # fmt: skip
            save_weights(path, self.model.transformer, self.model.text_encoder, metadata)


def withhold(casts: Iterable[tuple[Actor, ...]]) -> list[tuple[Actor, ...]]:
    """The same casts, but actors in `HELD_OUT` lose the word for their speed."""
    return [
        tuple(replace(a, speed=None) if (a.digit, a.direction, a.speed) in HELD_OUT else a for a in cast)
        for cast in casts
    ]


def latent_statistics(setting: Setting, device: torch.device, digits: Path | None) -> tuple[float, float]:
    """Mean and standard deviation of all pixels: one pair for all channels, which are folds of the same pixels."""
    sampler = VideoSampler("train", torch.Generator().manual_seed(0), device, 9, setting.side, digits)
    videos, _ = sampler.sample(STATISTICS_VIDEOS)
    return round(float(videos.mean()), 3), round(float(videos.std()), 3)


def make_optimizers(model: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest."""
    matrices = {name for name, p in model.named_parameters() if name.startswith("transformer.blocks.") and p.dim() == 2}
    chosen = [p for name, p in model.named_parameters() if name in matrices]
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(
            chosen, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.other_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95)),
    ]


def rate_factor(step: int, recipe: Recipe) -> float:
    """Of both learning rates: warm up, hold, fall linearly to zero."""
    rising = (step + 1) / recipe.warmup
    falling = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return min(1.0, rising, falling)


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


class averaged:
    """Context in which the model holds its moving average."""

    def __init__(self, model: nn.Module, ema: list[Tensor]) -> None:
        self.parameters, self.ema = [p.data for p in model.parameters()], ema

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for mine, average in zip(self.parameters, self.ema, strict=True):
            held = mine.clone()
            mine.copy_(average)
            average.copy_(held)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def commit() -> str:
    """What LITE_COMMIT says, or the short hash of the checkout."""
    if "LITE_COMMIT" in os.environ:
        return os.environ["LITE_COMMIT"]
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `Training.state` was written to a file."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if "origin" not in state:
            raise ValueError("it does not say what it was made with")
    except Exception as error:  # EOFError, KeyError, RuntimeError, UnpicklingError...: it depends on the content
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise SystemExit(f"train: {path} is no checkpoint: {reason}; remove it, or name another --output") from error
    return state


def forget_later_losses(log: Path, step: int) -> None:
    """Drop the lines of `log.csv` that a run wrote after its last checkpoint, which was at `step`, or half wrote."""
    if log.exists():
        with log.open(newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and int(row[0]) <= step]
        with log.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def train(training: Training, output: Path, minutes: float) -> None:
    """Train until all steps are done or `minutes` are over; checkpoint at the end and now and then."""
    started, spent = time.perf_counter(), training.seconds
    losses: list[Tensor] = []

    def save() -> None:
        training.seconds = spent + time.perf_counter() - started
        partial = output / "checkpoint.part"
        torch.save(training.state(), partial)
        partial.replace(output / "checkpoint.pt")

    def report(bar: Any) -> None:
        mean = float(torch.stack(losses).mean())
        losses.clear()
        with (output / "log.csv").open("a", newline="") as file:
            csv.writer(file).writerow([training.step, f"{mean:.5f}", f"{spent + time.perf_counter() - started:.1f}"])
        bar.set_postfix(loss=f"{mean:.4f}")
        if not math.isfinite(mean):
            raise SystemExit(f"train: the loss is {mean} at step {training.step}; the last checkpoint is untouched")

    total = training.recipe.steps
    title = f"train {training.setting.name}"
    with tqdm(total=total, initial=training.step, desc=title, unit="step", mininterval=5) as bar:
        for _ in remaining_steps(training, started, minutes):
            losses.append(training.train_step())
            bar.update()
            if training.step % LOG_EVERY == 0:
                report(bar)
            if training.step % SAVE_EVERY == 0:
                save()
                training.save_average(output / f"{training.setting.name}.safetensors")
    if losses:
        report(tqdm(disable=True))
    save()
    training.save_average(output / f"{training.setting.name}.safetensors")


def remaining_steps(training: Training, started: float, minutes: float) -> Iterator[int]:
    while training.step < training.recipe.steps and time.perf_counter() - started < 60 * minutes:
        yield training.step


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_float32_matmul_precision("high")
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = RECIPES[args.setting]
    given = {name: getattr(args, name) for name in ("steps", "batch", "noise_mean", "matrix_rate", "other_rate")}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    training = Training(SETTINGS[args.setting], recipe, args.seed, device, args.digits, args.init)
    checkpoint = args.output / "checkpoint.pt"
    if checkpoint.exists():
        training.load_state(read_checkpoint(checkpoint, device))
    forget_later_losses(args.output / "log.csv", training.step)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(
        f"{args.setting}: {training.setting.tokens:,} tokens per video, {parameters / 1e6:.1f} M parameters, {recipe}, "
        f"from step {training.step}, {device_name(device)}",
        flush=True,
    )
    train(training, args.output, args.minutes)
    print(f"step {training.step} of {recipe.steps}, {training.seconds / 60:.1f} minutes in all; see {args.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="small", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder (default: build/moving_digits/<setting>)")
    parser.add_argument("--steps", type=at_least(1), help="in all, over all runs (default: the recipe's)")
    parser.add_argument("--batch", type=at_least(1), help="videos per step (default: the recipe's)")
    parser.add_argument("--noise-mean", type=finite, help="of log(sigma / (1 - sigma)) (default: the recipe's)")
    parser.add_argument("--matrix-rate", type=positive, help="learning rate of Muon (default: the recipe's)")
    parser.add_argument("--other-rate", type=positive, help="learning rate of AdamW (default: the recipe's)")
    parser.add_argument(
        "--minutes", type=positive, default=math.inf, help="stop this run after so many (default: never)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: %(default)s")
    parser.add_argument("--init", type=existing_file, help="weights to start from, of the same architecture")
    parser.add_argument(
        "--digits", type=existing_file, help="scikit-learn's digits.csv.gz, where the package is missing"
    )
    parser.add_argument("--device", type=usable_device, help="default: cuda where there is one, else cpu")
    args = parser.parse_args(arguments)
    if args.output is None:
        args.output = Path("build/moving_digits") / args.setting
    with blame("--output", parser):
        args.output.mkdir(parents=True, exist_ok=True)
    with blame("--digits", parser):
        load_digits("train", args.digits)
    with blame("--init", parser):
        if args.init:
            setting_of(args.init)
    return args


if __name__ == "__main__":
    main()
