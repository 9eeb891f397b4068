"""`save_report`: a run as a file to read, or to make a report from later."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .decisions import format_table
from .html_report import render_html
from .in_force import FRACTIONS
from .run_record import RunRecord, collect_record, to_json
from .step_errors import StepErrors


def save_report(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    title: str | None = None,
    step_seconds: Sequence[float] = (),
    errors: StepErrors | None = None,
) -> Path:
    """Write what is known of the current run: sites with decisions and reasons, density, thresholds, versions.

    The page shows the density of every step if the model was compiled with the option `history`, else that of the last
    call, and with the option `probe` what every step dropped. Reads the states from the device, so it waits for it.

    Args:
        path: `.html` for a page that needs no other file, `.txt` for plain text, `.json` for data that
            `liteattention report` turns into either.
        model: the denoiser, for example `pipe.transformer`, compiled or not; None: all models. The sites are those of
            all graphs compiled in this process.
        title: default: the class of the model.
        step_seconds: measured seconds per step, if there are any.
        errors: what `measure_errors` returned. None: where the thresholds are a calibration's, those that it measured.

    Returns:
        the path that was written.

    Raises:
        ValueError: the path ends with nothing of these.
    """
    render = renderer(path)
    text = render(collect_record(model, title=title, step_seconds=step_seconds, errors=errors))
    target = Path(path)
    target.write_text(text, encoding="utf-8")
    return target


def renderer(path: str | os.PathLike[str]) -> Callable[[RunRecord], str]:
    """How a record becomes the text of a file of that name; `ValueError` if its ending is none of ours."""
    ending = Path(path).suffix.lower()
    if ending not in _RENDERERS:
        raise ValueError(f"path is {os.fspath(path)!r}; allowed: a name that ends with {', '.join(_RENDERERS)}")
    return _RENDERERS[ending]


def render_text(record: RunRecord) -> str:
    """The record for a terminal."""
    parts = [f"{record.title}, {record.created}"]
    parts += [f"  {name}: {value}" for name, value in record.environment.items()]
    parts += ["", str(record.report)]
    for number, settings in enumerate(record.settings):
        changed = ", ".join(f"{setting.name}={setting.value}" for setting in settings if setting.changed)
        parts.append(f"graph {number}: options {changed or 'all default'}")
    parts += ["", str(record.stats)]
    if any(stream.history for stream in record.stats.streams):
        parts += ["", "density per step, mean over the layers", *format_table(_history_rows(record))]
    if any(stream.dropped_mass for stream in record.stats.streams):
        title = "share of the softmax dropped per step, mean over the layers (most of any sampled query)"
        parts += ["", title, *format_table(_dropped_rows(record))]
    parts += _in_force_lines(record)
    if record.step_seconds:
        parts += ["", "seconds per step: " + " ".join(f"{seconds:.4g}" for seconds in record.step_seconds)]
    return "\n".join(parts) + "\n"


def _in_force_lines(record: RunRecord) -> list[str]:
    """Thresholds, ranges and errors; nothing if none are known."""
    known, lines = record.in_force, []
    if known.thresholds:
        header = ["layer", *(f"at {fraction:.0%}" for fraction in FRACTIONS), "given by"]
        rows = [header, *([row.layer, *row.values, row.given] for row in known.thresholds)]
        lines += ["", "thresholds in force, log2 units along the trajectory", *format_table(rows)]
    lines += [f"{name} in force: {value}" for name, value in known.ranges]
    return lines if known.errors is None else [*lines, "", str(known.errors)]


def _history_rows(record: RunRecord) -> list[list[str]]:
    means = {entry.stream: record.stats.mean_history(entry.stream) for entry in record.stats.streams if entry.history}
    return _rows_by_step(means, lambda density: f"{density:.3f}")


def _dropped_rows(record: RunRecord) -> list[list[str]]:
    stats = record.stats
    masses = {entry.stream: stats.dropped_mass(entry.stream) for entry in stats.streams if entry.dropped_mass}
    return _rows_by_step(masses, lambda mass: f"{mass[0]:.2e} ({mass[1]:.2e})")


def _rows_by_step(columns: Mapping[int, Sequence[Any]], text: Callable[[Any], str]) -> list[list[str]]:
    """A header and one line per step; `columns`: by stream, what each step is said to be, or None."""
    streams = sorted(columns)
    rows = [["step", *(f"stream {stream}" for stream in streams)]]
    for step, cells in enumerate(itertools.zip_longest(*(columns[stream] for stream in streams))):
        rows.append([str(step + 1), *("" if cell is None else text(cell) for cell in cells)])
    return rows


_RENDERERS: dict[str, Callable[[RunRecord], str]] = {
    ".html": render_html,
    ".htm": render_html,
    ".txt": render_text,
    ".json": to_json,
}
