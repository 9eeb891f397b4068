"""Videos of the trained pipeline by dense attention, by LiteAttention, and by the methods that it is compared to."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import WanPipeline
from moving_digits.pipeline import Setting
from moving_digits.sampling import generate
from radial_mask import RadialAttention
from sparse_video_gen import SparseVideoGen
from tile_masks import SparseAttention, VideoLayout, kernel_for
from torch import Tensor

import lite_compile

OTHERS: dict[str, type[SparseAttention]] = {"radial": RadialAttention, "sparse-video-gen": SparseVideoGen}
WARM_UP_STEPS = 2
"""Of an untimed generation, for what is compiled on the way."""


@dataclass(frozen=True)
class Videos:
    """What a method made.

    Attributes:
        videos: float32 `[B, 3, F, H, W]` in 0..1.
        density: mean share of the tiles that were computed, over videos, steps, guidance streams and layers.
        seconds: per video.
    """

    videos: Tensor
    density: float
    seconds: float


@dataclass(frozen=True)
class LiteMethod:
    """A way to use the backend: its options, and the threshold for a number that is below 0 and bolder as it rises."""

    name: str
    options: dict[str, Any]
    threshold: Callable[[float], Any]
    first: float
    """Where the search begins."""


def lite_methods() -> list[LiteMethod]:
    """Those that the installed lite_compile has; the first one sets the densities."""
    found = [
        LiteMethod("max, constant", {}, lambda x: x, -3.0),
        LiteMethod("max, schedule", {}, lambda x: lite_compile.Schedule.linear(3 * x, x), -1.0),
    ]
    if "criterion" in {option.name for option in fields(lite_compile.Options)}:
        found.append(LiteMethod("mass, constant", {"criterion": "mass"}, lambda x: x, -4.0))
    return found


class Comparison:
    """The trained pipeline and what it is asked for; makes videos with each method."""

    def __init__(
        self, pipe: WanPipeline, setting: Setting, prompts: Sequence[str], seeds: Sequence[int], steps: int,
        guidance: float, batch: int,
    ) -> None:  # fmt: skip
        self.pipe, self.setting, self.steps, self.guidance = pipe, setting, steps, guidance
        self.model = pipe.transformer
        self.layout = VideoLayout(setting.frames, setting.tokens // setting.frames)
        self.kernel = kernel_for(pipe.device, self.model.dtype, setting.head_dim)
        self._jobs = [
            (seed, list(prompts[start : start + batch])) for seed in seeds for start in range(0, len(prompts), batch)
        ]
        self.prompts = [prompt for _, part in self._jobs for prompt in part]

    def _generate(self, on_step_end: Callable[..., dict[str, Any]] | None = None) -> Iterator[tuple[Tensor, float]]:
        """Videos of one batch after another, and the seconds that it took."""
        for seed, part in self._jobs:
            started = time.perf_counter()
            videos = generate(self.pipe, self.setting, part, seed, self.steps, self.guidance, on_step_end)
            yield videos, time.perf_counter() - started

    def _warm_up(self) -> None:
        generate(self.pipe, self.setting, self._jobs[0][1], 0, WARM_UP_STEPS, self.guidance)

    def _collect(self, made: list[tuple[Tensor, float]], densities: list[float]) -> Videos:
        weights = torch.tensor([len(videos) for videos, _ in made], dtype=torch.float64)
        density = float((torch.tensor(densities, dtype=torch.float64) * weights).sum() / weights.sum())
        return Videos(torch.cat([videos for videos, _ in made]), density, sum(s for _, s in made) / int(weights.sum()))

    def dense(self) -> Videos:
        """PyTorch's attention, nothing compiled."""
        self._warm_up()
        made = list(self._generate())
        return self._collect(made, [1.0] * len(made))

    def other(self, name: str, density: float, dense_share: float) -> tuple[Videos, dict[str, Any]]:
        """One of `OTHERS` after a share of dense steps, so sparse that its mean density over all steps is `density`."""
        dense_steps, masked = round(dense_share * self.steps), self.density_of_mask(density, dense_share)
        method = OTHERS[name](self.layout, self.kernel, masked, dense_steps, device=self.pipe.device)
        made, densities = list[tuple[Tensor, float]](), list[float]()
        with method:
            for result in self._generate(method.end_step):
                made.append(result)
                densities.append(method.density())
        details = {"dense_steps": dense_steps, "density_of_mask": masked}
        if isinstance(method, SparseVideoGen):
            details["temporal_heads"] = method.temporal_share()
        return self._collect(made, densities), details

    def density_of_mask(self, density: float, dense_share: float) -> float:
        """What is left for the sparse steps after a share of dense ones; not above 0 if these are more than that."""
        dense_steps = round(dense_share * self.steps)
        return (density * self.steps - dense_steps) / max(1, self.steps - dense_steps)

    def lite(self, options: dict[str, Any]) -> Callable[[Any], Videos]:
        """A function from thresholds to videos: the model compiled once with these options."""
        fresh = copy.deepcopy(self.model)
        options = {"inner": "eager", "history": True, "on_unsupported": "error", **options}
        self.pipe.transformer = compiled = torch.compile(fresh, backend="liteattention", options=options)
        self._warm_up()

        def measure(threshold: Any) -> Videos:
            self.pipe.transformer = compiled
            lite_compile.set_threshold(fresh, threshold)
            made, densities = list[tuple[Tensor, float]](), list[float]()
            for result in self._generate():
                made.append(result)
                densities.append(mean_density(lite_compile.stats(fresh), self.steps))
            self.pipe.transformer = self.model
            return self._collect(made, densities)

        self.pipe.transformer = self.model
        return measure


def mean_density(stats: lite_compile.Stats, steps: int) -> float:
    """Over layers, streams and steps of the last generation; raises `RuntimeError` if it was cut in two on the way."""
    histories = [stream.history for stream in stats.streams]
    if not histories or any(len(history) != steps for history in histories):
        raise RuntimeError(f"not {steps} steps in one generation: {sorted({len(history) for history in histories})}")
    values = [1.0 if density is None else density for history in histories for density in history]
    return sum(values) / len(values)
