"""The option `dense_layers`: layers that skip nothing, by name or counted from the ends of the model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

from .errors import wrong_type, wrong_value
from .schedule import Schedule, Thresholds


class DenseLayers(NamedTuple):
    """Layers that skip nothing."""

    globs: tuple[str, ...] = ()
    first: int = 0
    """So many rewritten layers at the beginning of the model."""
    last: int = 0

    @property
    def any(self) -> bool:
        """Whether there may be such layers."""
        return bool(self.globs or self.first or self.last)


NO_DENSE_LAYERS = DenseLayers()


@lru_cache(maxsize=256)
def choose_layers(rule: DenseLayers, layers: tuple[str, ...]) -> frozenset[str]:
    """Those of a model's rewritten `layers`, in the model's order, that skip nothing."""
    named = {layer for layer in layers if any(fnmatchcase(layer, glob) for glob in rule.globs)}
    names = list(dict.fromkeys(layers))
    return frozenset(named | {*names[: rule.first]} | {*names[max(0, len(names) - rule.last) :]})


@dataclass(frozen=True)
class ExactLayers(Thresholds):
    """Thresholds of which some layers make no use: these mark nothing but tiles that a mask hides."""

    thresholds: Thresholds
    layers: frozenset[str]

    def schedule(self, layer: str) -> Schedule:
        """-inf for the exact layers."""
        return Schedule.constant(-inf) if layer in self.layers else self.thresholds.schedule(layer)


def check_dense_layers(name: str, value: Any) -> DenseLayers:
    """The option `dense_layers`: globs, or how many layers at both ends."""
    allowed = (
        "a list of layer-name globs such as ['blocks.0.*'], or a pair (first, last) of integers >= 0 that count layers "
        "from the model's ends"
    )
    if isinstance(value, DenseLayers):
        return value
    if not isinstance(value, list | tuple):
        raise wrong_type(name, value, allowed)
    if all(isinstance(glob, str) and glob for glob in value):
        return DenseLayers(tuple(value))
    if len(value) != 2 or any(isinstance(count, bool) or not isinstance(count, int) for count in value):
        raise wrong_type(name, value, allowed)
    if min(value) < 0:
        raise wrong_value(name, value, allowed)
    return DenseLayers((), *value)
