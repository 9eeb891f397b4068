"""Plots of what training and the measurements write down."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def pyplot() -> Any:
    """matplotlib without a screen; it is only needed here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_losses(logs: Mapping[str, Path], path: Path) -> None:
    """Loss against step, on one panel: a label and a `log.csv` of `train.py` for each line."""
    figure, axes = pyplot().subplots(figsize=(6, 3.4), layout="constrained")
    for label, log in logs.items():
        with log.open(newline="") as file:
            rows = [(int(step), float(loss)) for step, loss, _ in csv.reader(file)]
        axes.plot(*zip(*rows, strict=True), label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, mean of 50 steps")
    axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot().close(figure)


def draw_densities(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Density against step: one panel per threshold, one line per layer (mean over prompts and streams)."""
    size = (3.1 * len(runs), 3.4)
    figure, grid = pyplot().subplots(1, len(runs), figsize=size, sharey=True, layout="constrained", squeeze=False)
    panels = grid[0]
    colours = pyplot().get_cmap("viridis")
    for axes, (threshold, found) in zip(panels, runs.items(), strict=True):
        layers = list(found[0]["per_layer"])
        for number, layer in enumerate(layers):
            curves = torch.tensor([run["per_layer"][layer] for run in found]).mean(0)
            colour = colours(number / len(layers))
            axes.plot(range(1, len(curves) + 1), curves, color=colour, label=layer, linewidth=1.4)
        axes.set(title=f"threshold {float(threshold):g}", xlabel="denoising step", ylim=(0, 1.03))
        axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of tiles computed")
    panels[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot().close(figure)
