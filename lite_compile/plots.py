"""Pictures of what attention computes: density and error per layer and step, one head's weights with what is skipped.

matplotlib is imported when a picture is drawn. Figures belong to no window and to no state of `pyplot`'s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .attention_capture import AttentionCall, attention_map, given_attention
from .calibration.calibration_file import CalibratedThresholds
from .calibration.result import Calibration
from .layer_stats import Stats, StreamStats, stats
from .plot_errors import draw_errors, errors_to_draw
from .step_errors import StepErrors

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


def plot(
    model: nn.Module | Stats | StepErrors | Calibration | CalibratedThresholds | None = None, *,
    show: Literal["density", "dropped_mass", "error"] | None = None, path: Path | None = None,
) -> Any:  # fmt: skip
    """Heat map: one row per layer, one column per step of the current generation, one panel per stream.

    Args:
        model: the denoiser, compiled or not; what `lite_compile.stats` returned; None for all models of the process;
            or errors: what `measure_errors`, `calibrate` or `load_calibration` returned.
        show: "density", the share of the tiles that a step computed (option `history`); "dropped_mass", the share of
            the softmax that it skipped, mean over the sampled queries (option `probe`); or "error", of each layer at
            each step, of a model those of the calibration that it follows. None: "error" for errors, else "density".
        path: also save the picture there; the ending says the format.

    Returns:
        the `matplotlib.figure.Figure`.

    Raises:
        ValueError: there is nothing of that kind to draw.
        ImportError: matplotlib is not installed.
    """
    has_errors = isinstance(model, StepErrors | Calibration | CalibratedThresholds)
    show = ("error" if has_errors else "density") if show is None else show
    if show not in ("density", "dropped_mass", "error"):
        raise ValueError(f"show is {show!r}; allowed: 'density', 'dropped_mass', 'error'")
    if show == "error":
        errors = errors_to_draw(model)
        figure = new_figure(9.6, 2.2 + 0.22 * min(len(errors.layers), 60))
        draw_errors(figure, errors, _draw_steps)
        return _finish(figure, path)
    if isinstance(model, StepErrors | Calibration | CalibratedThresholds):
        raise ValueError(f"show is {show!r}; allowed for {type(model).__name__}: 'error'")
    found = model if isinstance(model, Stats) else stats(model)
    option, name = ("history", "density history") if show == "density" else ("probe", "dropped mass")
    recorded = [stream for stream in found.streams if (stream.history if show == "density" else stream.dropped_mass)]
    if not recorded:
        missing = "was recorded" if found.streams else "exists, since no compiled model has run yet"
        raise ValueError(f"no {name} {missing}; compile with options={{{option!r}: True}} and run one generation first")
    streams = sorted({stream.stream for stream in recorded})
    panels = [[entry for entry in recorded if entry.stream == stream] for stream in streams]
    height = 1.5 + 0.22 * min(max(map(len, panels)), 60)
    figure = new_figure(1.2 + 4.2 * len(panels), height)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    highest = max((value for entry in recorded for value in _masses(entry) if not math.isnan(value)), default=0.0)
    for axes, entries, stream in zip(grid, panels, streams, strict=True):
        if show == "density":
            image = _draw_densities(axes, entries)
            title = f"mean of the last step {_last_mean(entries)}"
        else:
            layers, rows = [entry.layer for entry in entries], [_masses(entry) for entry in entries]
            image = _draw_steps(axes, layers, rows, "magma_r", highest or 1.0)
            most = max((entry[1] for s in entries for entry in s.dropped_mass if entry is not None), default=0.0)
            title = f"most of any sampled query {most:.1e}"
        axes.set_title(f"stream {stream}: {title}", fontsize=10, loc="left")
    label = "share of tiles computed" if show == "density" else "share of the softmax dropped"
    figure.colorbar(image, ax=list(grid), label=label, pad=0.02)
    return _finish(figure, path)


def _masses(entry: StreamStats) -> list[float]:
    """Mean dropped mass per step, NaN where no state was used."""
    return [math.nan if step is None else step[0] for step in entry.dropped_mass]


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

    colours = LinearSegmentedColormap.from_list("density", [SKIPPED, COMPUTED])
    rows = [[math.nan if density is None else density for density in entry.history] for entry in entries]
    return _draw_steps(axes, [entry.layer for entry in entries], rows, colours, 1)


def _draw_steps(axes: Any, layers: Sequence[str], rows: list[list[float]], colours: Any, most: float) -> Any:
    """Values per layer and step from 0 to `most`; NaN is left white."""
    steps = max(map(len, rows))
    padded = [row + [math.nan] * (steps - len(row)) for row in rows]
    image = axes.imshow(
        padded, cmap=colours, vmin=0, vmax=most, aspect="auto", interpolation="nearest",
        extent=(0.5, steps + 0.5, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    every = math.ceil(len(layers) / MAX_LABELS)
    labels = range(0, len(layers), every)
    axes.set_yticks(labels, [layers[number] for number in labels], fontsize=7)
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
