"""The calibration file: thresholds by layer along the trajectory, as TOML that is meant to be read."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import OptionTypeError, OptionValueError, nearest
from ..ops import CRITERIA
from ..passes.find_attention import is_made_up
from ..schedule import Schedule, Thresholds
from ..step_errors import StepErrors
from .fingerprint import Fingerprint, fingerprint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1


@dataclass(frozen=True, repr=False)
class CalibratedThresholds(Thresholds):
    """The thresholds that `lite_compile.calibrate` found for the layers of one model."""

    layers: tuple[tuple[str, Schedule], ...]
    model: Fingerprint = field(compare=False)
    criterion: str = "max"
    """The option under which they were found; they mean something else under another."""
    source: str = field(default="", compare=False)
    """The file that they come from."""
    measured: StepErrors | None = field(default=None, compare=False)
    """Errors in the generations that the calibration ended with."""

    def schedule(self, layer: str) -> Schedule:
        """That of the layer; raises `OptionValueError` if there is none."""
        found = dict(self.layers).get(layer)
        if found is None:
            raise self._misfit(f"it has no thresholds for the layer {layer!r}.{nearest(layer, dict(self.layers))}")
        return found

    def check_layers(self, layers: Sequence[str]) -> None:
        """Raise `OptionValueError` with all `layers` that are missing."""
        known = dict(self.layers)
        missing = [layer for layer in layers if layer not in known]
        if missing:
            raise self._misfit(f"it has no thresholds for {_listed(missing, known)}")

    def check_criterion(self, criterion: str) -> None:
        """Raise `OptionValueError` if it is another one."""
        if criterion != self.criterion:
            raise self._misfit(f"it was made under criterion={self.criterion!r}, this model has {criterion!r}.")

    def check_model(self, modules: Sequence[nn.Module], layers: Sequence[str]) -> None:
        """Raise `OptionValueError` if this is another model, or lacks layers that the file has.

        Args:
            modules: one of them, or a part of one, should be the model; nothing is said if there are none.
            layers: names that are known to be right.
        """
        if not modules:
            return
        named = [part for module in modules for part in module.modules() if type(part).__name__ == self.model.name]
        found = next((part for part in named if fingerprint(part) == self.model), None)
        if found is None:
            given = fingerprint(named[0] if named else modules[0])
            raise self._misfit(f"it was made for {self.model}, this is {given}.")
        names = {name for name, _ in found.named_modules()} | set(layers)
        unknown = [name for name, _ in self.layers if name not in names and not is_made_up(name.rpartition(".")[2])]
        if unknown:
            raise self._misfit(f"the model does not have its {_listed(unknown, names)}")

    def _misfit(self, why: str) -> OptionValueError:
        given = self.source or self
        return OptionValueError(
            f"liteattention option 'threshold' is {str(given)!r}, a calibration that does not fit: {why} "
            "Allowed: a calibration of this model; lite_compile.calibrate makes one"
        )

    def __repr__(self) -> str:
        where = f"{self.source!r}, " if self.source else ""
        return f"CalibratedThresholds({where}{len(self.layers)} layers of {self.model.name})"


def _listed(names: Sequence[str], known: Mapping[str, Any] | set[str]) -> str:
    found = ((name, nearest(name, known).strip()) for name in names[:8])
    hints = [f"{name!r} ({hint[0].lower()}{hint[1:]})" if hint else repr(name) for name, hint in found]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    kind = "layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{kind} {', '.join(hints)}{more}."


def load_calibration(path: str | os.PathLike[str]) -> CalibratedThresholds:
    """Read a file of `lite_compile.calibrate`.

    Raises:
        OptionValueError: there is no such file, or it is no valid calibration.
    """
    source = os.fspath(path)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # of a NUL in the name, of what is no UTF-8
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error})"
        raise _bad(source, reason) from error
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _bad(source, f"it is no TOML: {error}") from error
    version = content.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise _bad(source, f"its 'format' is {version!r}, this version of lite-compile reads {FORMAT}")
    model = _table(content, "model", source)
    name, count, digest = (model.get(key) for key in ("class", "parameters", "digest"))
    if (
        not isinstance(name, str)
        or isinstance(count, bool)
        or not isinstance(count, int)
        or not isinstance(digest, str)
    ):
        raise _bad(source, "its table [model] lacks class, parameters or digest")
    settings = _table(content, "calibration", source)
    criterion = settings.get("criterion")
    if criterion not in CRITERIA:
        raise _bad(source, f"'criterion' in its table [calibration] is {criterion!r}, not one of {', '.join(CRITERIA)}")
    trajectory = _table(content, "trajectory", source)
    fractions = trajectory.get("fractions")
    if not isinstance(fractions, list):
        raise _bad(source, "its table [trajectory] has no list 'fractions'")
    layers = _table(content, "layers", source)
    if not layers:
        raise _bad(source, "its table [layers] is empty")
    schedules = tuple((layer, _read_layer(source, layer, entry, fractions)) for layer, entry in layers.items())
    measured = _read_measured(source, str(settings.get("metric")), fractions, trajectory.get("budget"), layers)
    return CalibratedThresholds(schedules, Fingerprint(name, count, digest), criterion, source, measured)


def _read_layer(source: str, layer: str, entry: Any, fractions: list[Any]) -> Schedule:
    values = entry.get("thresholds") if isinstance(entry, dict) else None
    if not isinstance(values, list):
        raise _bad(source, f"layer {layer!r} has no list 'thresholds'")
    try:
        return Schedule(tuple(fractions), tuple(values), f"that of {layer!r} in {source!r}")
    except (OptionTypeError, OptionValueError) as error:
        detail = str(error).replace("liteattention option 'threshold'", "the value")
        raise _bad(source, f"layer {layer!r}: {detail}") from error


def _read_measured(
    source: str, metric: str, fractions: list[float], budget: Any, layers: Mapping[str, Any]
) -> StepErrors | None:
    """What the file says of errors, which may have been left out of it."""
    if budget is None and not any("errors" in entry for entry in layers.values()):
        return None
    rows = {"'budget' in [trajectory]": budget}
    rows |= {f"'errors' of layer {layer!r}": entry.get("errors") for layer, entry in layers.items()}
    for name, row in rows.items():
        if not isinstance(row, list) or len(row) != len(fractions) or not all(map(_is_error, row)):
            raise _bad(source, f"{name} is no list of numbers >= 0 (nan: unknown), one per fraction")
    errors = {
        layer: {f: float(e) for f, e in zip(fractions, entry["errors"], strict=True) if not math.isnan(e)}
        for layer, entry in layers.items()
    }
    allowed = dict(zip(fractions, map(float, budget), strict=True))
    return StepErrors.from_points(metric, errors, allowed, f"calibration {source!r}")


def _is_error(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not value < 0


def _table(content: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    found = content.get(name)
    if not isinstance(found, dict):
        raise _bad(source, f"it has no table [{name}]")
    return found


def _bad(source: str, why: str) -> OptionValueError:
    return OptionValueError(
        f"liteattention option 'threshold' is {source!r}: {why}; allowed: a file of lite_compile.calibrate, "
        "or a number, schedule or dict"
    )


@dataclass(frozen=True)
class LayerColumn:
    """What the file says of one layer, one number per fraction; NaN where nothing was measured."""

    thresholds: tuple[float, ...]
    errors: tuple[float, ...]
    densities: tuple[float, ...]


def write_calibration(
    path: Path, tables: Mapping[str, Mapping[str, Any]], fractions: Sequence[float], budget: Sequence[float],
    layers: Mapping[str, LayerColumn],
) -> None:  # fmt: skip
    """Write the file; an earlier one stays until the new one is complete.

    Args:
        tables: name and content of the tables that come first.
        fractions: of the trajectory, rising from 0 to 1.
        budget: error allowed at each of them.
        layers: by name.
    """
    lines = [
        "# Thresholds of liteattention, found by lite_compile.calibrate.",
        f'# Use it: torch.compile(model, backend="liteattention", options={{"threshold": {json.dumps(path.name)}}})',
        f"format = {FORMAT}",
    ]
    for name, content in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in content.items())]
    lines += [
        "", "[trajectory]",
        "# Share of the noise that is gone: 0 is the first step, 1 the end. All lists below have one entry for each.",
        f"fractions = {_value(list(fractions))}",
        "# Error of a layer's attention output that is allowed there: its share of target_error.",
        f"budget = {_value(list(budget))}", "",
        "# thresholds: log2 units, <= 0; what a step marks by them is skipped from the next step on.",
        "# errors: worst measured in a generation under these thresholds, in units of the metric; nan: no step there.",
        "# densities: share of the tiles of QK^T that were computed; nan: no step there.",
    ]  # fmt: skip
    for layer, column in layers.items():
        lines += ["", f"[layers.{json.dumps(layer)}]", *(f"{k} = {_value(list(v))}" for k, v in vars(column).items())]
    partial = path.with_name(f"{path.name}.part")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool) or not isinstance(value, float):
        return json.dumps(value)  # strings and integers are the same in TOML
    if math.isnan(value) or math.isinf(value):
        return str(value)
    text = repr(float(f"{value:.9g}"))
    return text if set(text) & set(".e") else f"{text}.0"
