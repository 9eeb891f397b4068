"""Pictures of what attention computes: density per layer and step, and one head's weights with what is skipped.

matplotlib is imported when a picture is drawn. Figures belong to no window and to no state of `pyplot`'s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .attention_capture import AttentionCall, attention_map, given_attention
from .layer_stats import Stats, StreamStats, stats

COMPUTED, SKIPPED = "#20466b", "#eceff3"
"""Colours of density 1 and 0."""
OVERLAY = "#e07b39"
MAX_LABELS = 24
SPAN = 4.0
"""Decades below its maximum at which the colours of an attention map end."""

Path = str | os.PathLike[str]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches; `ImportError` says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "lite_compile.plot needs matplotlib: pip install matplotlib, or pip install 'lite-compile[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plot(model: nn.Module | Stats | None = None, *, path: Path | None = None) -> Any:
    """Heat map of density: one row per layer, one column per step of the current generation, one panel per stream.

    Args:
        model: the denoiser, compiled or not, with the option `history`; what `lite_compile.stats` returned; or None for
            all models of the process.
        path: also save the picture there; the ending says the format.

    Returns:
        the `matplotlib.figure.Figure`.

    Raises:
        ValueError: there is no history to draw.
        ImportError: matplotlib is not installed.
    """
    found = model if isinstance(model, Stats) else stats(model)
    recorded = [stream for stream in found.streams if stream.history]
    if not recorded:
        missing = "was recorded" if found.streams else "exists, since no compiled model has run yet"
        raise ValueError(
            f"no density history {missing}; compile with options={{'history': True}} and run one generation first"
        )
    streams = sorted({stream.stream for stream in recorded})
    panels = [[entry for entry in recorded if entry.stream == stream] for stream in streams]
    height = 1.5 + 0.22 * min(max(map(len, panels)), 60)
    figure = new_figure(1.2 + 4.2 * len(panels), height)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, entries, stream in zip(grid, panels, streams, strict=True):
        image = _draw_densities(axes, entries)
        axes.set_title(f"stream {stream}: mean of the last step {_last_mean(entries)}", fontsize=10, loc="left")
    figure.colorbar(image, ax=list(grid), label="share of tiles computed", pad=0.02)
    return _finish(figure, path)


def plot_attention(
    attention: AttentionCall | nn.Module, layer: str | None = None, q: Tensor | None = None, k: Tensor | None = None,
    *, stream: int = 0, scale: float | None = None, batch: int = 0, head: int = 0, path: Path | None = None,
) -> Any:  # fmt: skip
    """Attention of one head, with and without the skipped tiles laid over it.

    The title says how much softmax mass the skipped tiles hold, which is what skipping leaves out.

    Args:
        attention: a call that `capture_attention` caught; or the model, with `layer`, `q` and `k`.
        layer: as `lite_compile.stats(model)` prints it.
        q, k: `[B, H, S, D]`, of the shape that the layer was called with; shown with the tiles that the next call of
            `stream` will skip.
        scale: softmax scale of `q` and `k`; default: one over the root of D.
        path: also save the picture there; the ending says the format.

    Returns:
        the `matplotlib.figure.Figure`.
    """
    if isinstance(attention, nn.Module):
        if layer is None or q is None or k is None:
            raise TypeError("plot_attention of a model needs layer, q and k; or give it a call of capture_attention")
        attention = given_attention(attention, layer, q, k, stream, scale)
    if not isinstance(attention, AttentionCall):
        raise TypeError(
            f"attention is {attention!r} ({type(attention).__name__}); allowed: a call that capture_attention caught, "
            "or a model with layer, q and k"
        )
    figure = new_figure(9.6, 4.9)
    weights, *_, mean_lost, max_lost = attention_map(attention, batch, head)
    skipped = attention.skipped[batch, head]
    q_len, k_len = attention.q.shape[2], attention.k.shape[2]
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    top = max(math.log10(max(float(weights.max()), 1e-30)), 0.0)
    logs = weights.clamp(min=10 ** (top - SPAN)).log10()
    for axes in panels:
        image = axes.imshow(
            logs.numpy(), cmap="viridis", vmin=top - SPAN, vmax=top, extent=(0, k_len, q_len, 0), aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_xlabel("key")
        axes.tick_params(length=2, labelsize=8)
    tile = attention.tile
    bounds = (0, skipped.shape[1] * tile.k, skipped.shape[0] * tile.q, 0)
    overlay = _transparent(OVERLAY, skipped)
    panels[1].imshow(overlay, extent=bounds, aspect="auto", interpolation="nearest")
    panels[1].set(xlim=(0, k_len), ylim=(q_len, 0))
    panels[0].set_ylabel("query")
    panels[0].set_title("softmax weights", fontsize=10, loc="left")
    share = float(skipped.float().mean())
    losses = f"they hold {mean_lost:.2%} of the softmax mass, {max_lost:.2%} in the worst row"
    panels[1].set_title(f"orange: {share:.0%} of the tiles are skipped\n{losses}", fontsize=10, loc="left")
    where = "next step" if attention.step < 0 else f"step {attention.step + 1}"
    figure.suptitle(f"{attention.layer}, {where}, stream {attention.stream}, head {head}", x=0.01, ha="left")
    figure.colorbar(image, ax=list(panels), label="log10 of the weight, uniform attention = 0", pad=0.02)
    return _finish(figure, path)


def _draw_densities(axes: Any, entries: Sequence[StreamStats]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("density", [SKIPPED, COMPUTED]).with_extremes(bad="#ffffff")
    steps = max(len(entry.history) for entry in entries)
    rows = [[math.nan if d is None else d for d in entry.history] for entry in entries]
    padded = [row + [math.nan] * (steps - len(row)) for row in rows]
    image = axes.imshow(
        padded, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0.5, steps + 0.5, len(entries) - 0.5, -0.5),
    )  # fmt: skip
    every = math.ceil(len(entries) / MAX_LABELS)
    labels = range(0, len(entries), every)
    axes.set_yticks(labels, [entries[number].layer for number in labels], fontsize=7)
    axes.set_xlabel("denoising step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return image


def _last_mean(entries: Sequence[StreamStats]) -> str:
    last = [entry.history[-1] for entry in entries if entry.history[-1] is not None]
    return f"{sum(last) / len(last):.2f}" if last else "unknown"


def _transparent(colour: str, where: Tensor) -> Any:
    """RGBA picture of that colour where `where` holds, clear elsewhere."""
    from matplotlib.colors import to_rgba

    picture = where.new_zeros((*where.shape, 4)).float()
    picture[where] = picture.new_tensor(to_rgba(colour, 0.75))
    return picture.numpy()


def _finish(figure: Any, path: Path | None) -> Any:
    if path is not None:
        figure.savefig(path, dpi=150, facecolor="white")
    return figure
