"""The pictures of `demo.py`: density against step, and one layer's skip mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from lite_compile.plots import COMPUTED, SKIPPED

STREAM_COLOURS = ("#20466b", "#c8642b", "#3f8f5f", "#8a5a9e")
MAX_HEADS = 4


def draw_density(steps: Sequence[Mapping[tuple[str, int], float]], path: Path) -> Path:
    """Density per step: one thin line per layer and stream, one thick line per stream's mean over the layers."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    numbers = range(1, len(steps) + 1)
    for stream in sorted({stream for step in steps for _, stream in step}):
        colour = STREAM_COLOURS[stream % len(STREAM_COLOURS)]
        layers = sorted({layer for step in steps for layer, s in step if s == stream})
        curves = [[step.get((layer, stream), float("nan")) for step in steps] for layer in layers]
        for curve in curves:
            axes.plot(numbers, curve, color=colour, linewidth=0.8, alpha=0.35)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        style = "-" if stream == 0 else "--"
        axes.plot(
            numbers, mean, style, color=colour, linewidth=2.2, label=f"stream {stream}, mean of {len(layers)} layers"
        )
    axes.set(xlabel="denoising step", ylabel="share of tiles computed", ylim=(0, 1.03), xlim=(1, max(len(steps), 2)))
    axes.set_title("Density of self-attention (thin: single layers)", loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def draw_skip_mask(mask: Tensor, title: str, tile: tuple[int, ...], path: Path) -> Path:
    """The skip mask of one layer and stream, bool `[heads, q_tiles, k_tiles]`: its first heads side by side."""
    heads = min(mask.shape[0], MAX_HEADS)
    figure, panels = plt.subplots(1, heads, figsize=(3.2 * heads + 0.6, 4.1), squeeze=False, layout="constrained")
    for head, axes in enumerate(panels[0]):
        axes.imshow(
            mask[head].numpy(), cmap=ListedColormap([COMPUTED, SKIPPED]), vmin=0, vmax=1, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(f"head {head}: {1 - mask[head].float().mean().item():.0%} computed", fontsize=10, loc="left")
        axes.set_xlabel(f"key tile ({tile[1]} tokens each)")
        axes.tick_params(length=2, labelsize=8)
    panels[0][0].set_ylabel(f"query tile ({tile[0]} tokens each)")
    figure.suptitle(f"Skip mask after the last step: {title}", x=0.01, ha="left")
    figure.legend(
        handles=[
            Patch(facecolor=COMPUTED, label="computed"),
            Patch(facecolor=SKIPPED, edgecolor="#9aa3ad", label="skipped"),
        ],
        loc="outside upper right", ncols=2, frameon=False,
    )  # fmt: skip
    return _save(figure, path)


def save_frames(output: Any, stem: Path) -> Path:
    """A pipeline's PIL output as a GIF, or as a PNG where it is an image."""
    from diffusers.utils import export_to_gif

    first = output[0]
    if not isinstance(first, list):
        path = stem.with_suffix(".png")
        first.save(path)
        return path
    path = stem.with_suffix(".gif")
    export_to_gif(first, str(path), fps=16)
    return path


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    return path
