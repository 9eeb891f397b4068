"""Charts as SVG text, without any library. Colours are the page's CSS variables, so that they suit light and dark.

Text is always escaped here: callers give plain strings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

CELL_WIDTH, CELL_HEIGHT = 16, 15
CHARACTER = 6.3
"""Width of a character of the labels, in pixels."""
MAX_LABEL = 36
CHART_WIDTH, CHART_HEIGHT = 480, 200
STREAM_COLOURS = 4

Row = tuple[str, Sequence[float | None]]


def heat_map(rows: Sequence[Row], describe: str, most: float = 1.0, digits: str = ".3f") -> str:
    """Values per layer (down) and step (across) from 0 to `most`: the fuller a cell, the more; hollow: unknown.

    Args:
        digits: format of a value.
    """
    columns = max(len(values) for _, values in rows)
    left = round(CHARACTER * max(len(_short(label)) for label, _ in rows)) + 10
    width, height = left + CELL_WIDTH * columns + 12, CELL_HEIGHT * len(rows) + 34
    parts = []
    for number, (label, values) in enumerate(rows):
        y = number * CELL_HEIGHT
        parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(_short(label))}</text>')
        for step, value in enumerate(values):
            shown = "no state used" if value is None else f"{value:{digits}}"
            kind, opacity = ("u", "") if value is None else ("c", f' fill-opacity="{value / most:.3f}"')
            parts.append(
                f'<rect class="{kind}" x="{left + step * CELL_WIDTH}" y="{y}" width="{CELL_WIDTH - 1}" '
                f'height="{CELL_HEIGHT - 1}"{opacity}><title>{escape(label)}, step {step + 1}: {shown}</title></rect>'
            )
    base = (
        f'<rect class="z" x="{left}" y="0" width="{CELL_WIDTH * columns - 1}" height="{CELL_HEIGHT * len(rows) - 1}"/>'
    )
    bottom = CELL_HEIGHT * len(rows) + 13
    for step in _ticks(columns):
        x = left + step * CELL_WIDTH + CELL_WIDTH / 2
        parts.append(f'<text x="{x:.0f}" y="{bottom}" text-anchor="middle">{step + 1}</text>')
    parts.append(f'<text class="m" x="{left}" y="{bottom + 15}">denoising step</text>')
    return _svg(width, height, describe, base + "".join(parts))


def line_chart(lines: Sequence[tuple[int, Sequence[float | None]]], describe: str) -> str:
    """Mean density of each stream (number, value per step) against the step, from 0 to 1."""
    steps = max(len(values) for _, values in lines)
    left, right, top, bottom = 34, 74, 8, CHART_HEIGHT - 34

    def x(step: int) -> float:
        return left + (CHART_WIDTH - left - right) * step / max(1, steps - 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value

    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<line class="g" x1="{left}" x2="{CHART_WIDTH - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    labels: list[float] = []
    for stream, values in lines:
        known = [(x(step), y(value)) for step, value in enumerate(values) if value is not None]
        if not known:
            continue
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in known)
        colour = f"s{stream % STREAM_COLOURS}"
        parts.append(f'<polyline class="l {colour}" points="{points}"/>')
        px, py = known[-1]
        parts.append(f'<circle class="{colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
        while any(abs(py - other) < 13 for other in labels):
            py += 2
        labels.append(py)
        parts.append(f'<text x="{px + 8:.1f}" y="{py + 4:.1f}">stream {stream}</text>')
    for step in _ticks(steps):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 15}" text-anchor="middle">{step + 1}</text>')
    parts.append(f'<text class="m" x="{left}" y="{CHART_HEIGHT - 3}">denoising step</text>')
    return _svg(CHART_WIDTH, CHART_HEIGHT, describe, "".join(parts))


def bar_chart(values: Sequence[float], unit: str, describe: str) -> str:
    """One bar per step."""
    left, top, bottom = 52, 8, CHART_HEIGHT - 34
    highest = max(values) or 1.0
    pitch = (CHART_WIDTH - left - 8) / len(values)
    parts = []
    for share in (0, 0.5, 1):
        y = bottom - (bottom - top) * share
        parts.append(f'<line class="g" x1="{left}" x2="{CHART_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{share * highest:.3g}</text>')
    for step, value in enumerate(values):
        height = (bottom - top) * value / highest
        parts.append(
            f'<rect class="b" x="{left + step * pitch:.1f}" y="{bottom - height:.1f}" width="{max(1, pitch - 2):.1f}" '
            f'height="{height:.1f}"><title>step {step + 1}: {value:.4g} {escape(unit)}</title></rect>'
        )
    for step in _ticks(len(values)):
        parts.append(
            f'<text x="{left + (step + 0.5) * pitch:.1f}" y="{bottom + 15}" text-anchor="middle">{step + 1}</text>'
        )
    parts.append(f'<text class="m" x="{left}" y="{CHART_HEIGHT - 3}">denoising step; {escape(unit)}</text>')
    return _svg(CHART_WIDTH, CHART_HEIGHT, describe, "".join(parts))


def _ticks(count: int) -> list[int]:
    """At most some fifteen of the positions below `count`: the first, then those whose numbers, from 1, are round."""
    every = next((n for n in (1, 2, 5, 10, 20) if count / n <= 15), math.ceil(count / 15))
    return [step for step in range(count) if step == 0 or (step + 1) % every == 0]


def _short(label: str) -> str:
    """The end of a long label, which tells layers apart."""
    return label if len(label) <= MAX_LABEL else "…" + label[1 - MAX_LABEL :]


def _svg(width: float, height: float, describe: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(describe)}">{content}</svg>'
    )
