"""One run as data: decisions, density, settings, machine. It is saved as JSON, and reports are made from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .control import check_model
from .decisions import GraphReport, Reason, Report, SiteReport, report
from .environment import describe_environment
from .in_force import InForce, ThresholdRow, in_force
from .layer_state import layer_states
from .layer_stats import Stats, StreamStats, stats
from .options import Options
from .step_errors import StepErrors

FORMAT, VERSION = "lite-compile run", 1


class Setting(NamedTuple):
    """One option of a compiled graph."""

    name: str
    value: str
    """As Python writes it."""
    changed: bool
    """Whether it differs from the default."""


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run when it is recorded."""

    title: str
    created: str
    """UTC, ISO 8601."""
    environment: dict[str, str]
    report: Report
    """Decisions about all graphs compiled in the process."""
    settings: tuple[tuple[Setting, ...], ...]
    """The options of each graph of the report."""
    stats: Stats
    state_bytes: int
    """Memory of all skip states, also of other shapes."""
    step_seconds: tuple[float, ...]
    """What the user measured per step; empty if unknown."""
    in_force: InForce = InForce((), (), None)
    """Thresholds and ranges that the last calls followed, and errors: measured by the user, or by the calibration."""

    @property
    def steps(self) -> int:
        """Most steps that a stream has seen in its generation."""
        return max((stream.steps for stream in self.stats.streams), default=0)


def collect_record(
    model: nn.Module | None = None, *, title: str | None = None, step_seconds: Sequence[float] = (),
    errors: StepErrors | None = None,
) -> RunRecord:  # fmt: skip
    """The state of `model` (None: of all models) now, and what was compiled in this process."""
    states = layer_states(check_model(model))
    decided = report()
    if title is None:
        title = "liteattention run" if model is None else type(getattr(model, "_orig_mod", model)).__name__
    seconds = list(step_seconds)
    if not all(isinstance(s, int | float) and math.isfinite(s) and s >= 0 for s in seconds):
        raise ValueError(f"step_seconds is {seconds!r}; allowed: seconds per step, finite numbers >= 0")
    if errors is not None and not isinstance(errors, StepErrors):
        raise TypeError(
            f"errors is {errors!r} ({type(errors).__name__}); allowed: what measure_errors returns, or None"
        )
    known = in_force(model)
    return RunRecord(
        title=title,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=describe_environment(),
        report=Report(tuple(replace(graph, options=None) for graph in decided.graphs)),
        settings=tuple(_settings(graph.options) for graph in decided.graphs),
        stats=stats(model),
        state_bytes=sum(state.state.nbytes for state in states),
        step_seconds=tuple(map(float, seconds)),
        in_force=known if errors is None else known._replace(errors=errors),
    )


def _settings(options: Options | None) -> tuple[Setting, ...]:
    if options is None:
        return ()
    default = Options()
    values = [(entry.name, getattr(options, entry.name), getattr(default, entry.name)) for entry in fields(options)]
    return tuple(Setting(name, repr(value), value != usual) for name, value, usual in values)


def to_json(record: RunRecord) -> str:
    """Text of the file that `from_json` reads."""
    graphs = []
    for graph, settings in zip(record.report.graphs, record.settings, strict=True):
        sites = [asdict(site) | {"reason": site.reason and site.reason.value} for site in graph.sites]
        graphs.append({"clock": graph.clock, "sites": sites, "settings": [setting._asdict() for setting in settings]})
    content = {
        "format": FORMAT, "version": VERSION, "title": record.title, "created": record.created,
        "environment": record.environment, "graphs": graphs,
        "streams": [asdict(stream) for stream in record.stats.streams],
        "state_bytes": record.state_bytes, "step_seconds": record.step_seconds,
        "thresholds": [row._asdict() for row in record.in_force.thresholds], "ranges": record.in_force.ranges,
        "errors": None if record.in_force.errors is None else asdict(record.in_force.errors),
    }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> RunRecord:
    """A record from its file's text; `ValueError` says what is wrong with it."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"not a recorded run, whose 'format' is {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"version {content.get('version')!r} of the format; this lite-compile reads {VERSION}")
    try:
        graphs = [GraphReport(tuple(map(_site, graph["sites"])), str(graph["clock"])) for graph in content["graphs"]]
        return RunRecord(
            title=str(content["title"]),
            created=str(content["created"]),
            environment={str(name): str(value) for name, value in content["environment"].items()},
            report=Report(tuple(graphs)),
            settings=tuple(tuple(map(_setting, graph["settings"])) for graph in content["graphs"]),
            stats=Stats(tuple(map(_stream, content["streams"]))),
            state_bytes=int(content["state_bytes"]),
            step_seconds=tuple(map(_finite, content["step_seconds"])),
            in_force=_in_force(content),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"damaged, or not written by lite-compile: {type(error).__name__}: {error}") from error


def read_record(path: str | Path) -> RunRecord:
    """The record in a file; `ValueError` and `OSError` name the file."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; allowed: a file of lite_compile.save_report('run.json')") from error


def _site(entry: Mapping[str, Any]) -> SiteReport:
    reason = None if entry["reason"] is None else Reason(entry["reason"])
    shapes = {name: tuple(entry[name]) for name in ("q_shape", "k_shape")}
    protected = tuple((start, end) for start, end in entry["protected"])
    texts = {name: str(entry[name]) for name in ("layer", "detail", "dtype", "kernel", "protected_by")}
    return SiteReport(**{**entry, **shapes, **texts, "reason": reason, "protected": protected})


def _setting(entry: Mapping[str, Any]) -> Setting:
    return Setting(**{**entry, "name": str(entry["name"]), "value": str(entry["value"])})


def _stream(entry: Mapping[str, Any]) -> StreamStats:
    counts = {name: int(entry[name]) for name in _COUNTS}
    history = tuple(None if density is None else _finite(density) for density in entry["history"])
    density = _finite(entry["density"])
    dropped = tuple(
        None if step is None else (_finite(step[0]), _finite(step[1])) for step in entry.get("dropped_mass", ())
    )
    numbers = {"density": density, "history": history, "dropped_mass": dropped}
    return StreamStats(**{**entry, **counts, "layer": str(entry["layer"]), **numbers})


def _in_force(content: Mapping[str, Any]) -> InForce:
    """Files of earlier versions have nothing of it."""
    rows = [
        ThresholdRow(str(row["layer"]), tuple(map(str, row["values"])), str(row["given"]))
        for row in content.get("thresholds", ())
    ]
    ranges = tuple((str(name), str(value)) for name, value in content.get("ranges", ()))
    errors = content.get("errors")
    return InForce(tuple(rows), ranges, None if errors is None else _errors(errors))


def _errors(entry: Mapping[str, Any]) -> StepErrors:
    fractions = tuple(map(_finite, entry["fractions"]))
    layers = [(str(layer), tuple(None if e is None else _finite(e) for e in row)) for layer, row in entry["layers"]]
    budget = None if entry["budget"] is None else tuple(map(_finite, entry["budget"]))
    rows = [row for _, row in layers] + ([] if budget is None else [budget])
    if any(len(row) != len(fractions) for row in rows):
        raise ValueError("errors of another number of steps than there are fractions")
    return StepErrors(str(entry["metric"]), fractions, tuple(layers), budget, str(entry["source"]))


_COUNTS = ("stream", "steps", "generations", "calls", "dense_calls", "state_bytes")


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number
