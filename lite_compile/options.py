"""The options of `torch.compile(..., backend="liteattention", options={...})`: names, defaults, types and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from .dense_layers import NO_DENSE_LAYERS, DenseLayers, check_dense_layers
from .errors import OptionTypeError, OptionValueError, nearest, wrong_type, wrong_value
from .key_ranges import KeyRanges, Positions, check_disjoint, check_ranges, is_pair, is_range
from .ops import CRITERIA, MAX_PROTECTED
from .schedule import Thresholds, as_thresholds, check_threshold
from .trajectory import DenseSteps

Inner = Literal["inductor", "aot_eager", "eager"]
KernelName = Literal["auto", "hopper", "triton", "cpu"]
OnUnsupported = Literal["dense", "error"]
Criterion = Literal["max", "mass"]


def _option(default: Any, check: Callable[[str, Any], Any], doc: str) -> Any:
    return field(default=default, metadata={"check": check, "doc": doc})


def _integer(minimum: int, maximum: int, instead: str = "") -> Callable[[str, Any], int]:
    """`instead`: what else is allowed, for the message."""

    def check(name: str, value: Any) -> int:
        allowed = f"{instead}an integer from {minimum} to {maximum}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, value, allowed)
        if not minimum <= value <= maximum:
            raise wrong_value(name, value, allowed)
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, value, "True or False")
    return value


def _integer_or_none(minimum: int, maximum: int) -> Callable[[str, Any], int | None]:
    check = _integer(minimum, maximum, "None, or ")
    return lambda name, value: None if value is None else check(name, value)


def _integer_or_auto(minimum: int, maximum: int) -> Callable[[str, Any], int | str]:
    instead = "'auto', or "
    check = _integer(minimum, maximum, instead)
    allowed = f"{instead}an integer from {minimum} to {maximum}"
    return lambda name, value: "auto" if _is_auto(name, value, allowed) else check(name, value)


def _is_auto(name: str, value: Any, allowed: str) -> bool:
    """Whether a value is 'auto'; an error that says so if it nearly is."""
    if not isinstance(value, str) or value == "auto":
        return isinstance(value, str)
    raise OptionTypeError(f"{wrong_type(name, value, allowed)}.{nearest(value, ['auto'])}")


def _dense_steps(name: str, value: Any) -> DenseSteps:
    allowed = (
        "a pair (first, last), each an integer from 0 to 2^30 that counts steps or a float from 0 to 1, their share"
    )
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wrong_type(name, value, allowed)
    if any(isinstance(part, bool) or not isinstance(part, int | float) for part in value):
        raise wrong_type(name, value, allowed)
    if not all(0 <= part <= (1 if isinstance(part, float) else 2**30) for part in value):
        raise wrong_value(name, value, allowed)
    return DenseSteps(*(part or 0 for part in value))


def _globs(name: str, value: Any) -> tuple[str, ...]:
    allowed = "a list of layer-name globs such as ['blocks.*.attn1']"
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise wrong_type(name, value, allowed)
    if not all(isinstance(glob, str) and glob for glob in value):
        raise wrong_type(name, value, allowed)
    return tuple(value)


def _protect(name: str, value: Any) -> tuple[Positions, ...] | Literal["auto"]:
    allowed = (
        f"'auto', or a list of at most {MAX_PROTECTED} pairs (start, end) of positions such as [(0, 512)] or "
        "[(-256, None)], with start < end where both count from the same side, and none that counts its start from "
        "the end and its end from the beginning"
    )
    if _is_auto(name, value, allowed):
        return "auto"
    pairs = () if value is None else value
    if not isinstance(pairs, list | tuple) or not all(map(is_pair, pairs)):
        raise wrong_type(name, value, allowed)
    if len(pairs) > MAX_PROTECTED or not all(map(is_range, pairs)):
        raise wrong_value(name, value, allowed)
    return tuple((start, end) for start, end in pairs)


def _one_of(*choices: str, instead: str = "") -> Callable[[str, Any], str]:
    """`instead`: what else is allowed, for the message."""

    def check(name: str, value: Any) -> str:
        allowed = instead + " | ".join(repr(choice) for choice in choices)
        if not isinstance(value, str):
            raise wrong_type(name, value, allowed)
        if value not in choices:
            raise OptionValueError(f"{wrong_value(name, value, allowed)}.{nearest(value, choices)}")
        return value

    return check


def _qk_dtype(name: str, value: Any) -> str | None:
    return None if value is None else _one_of("int8", "fp8", instead="None | ")(name, value)


def _mode(name: str, value: Any) -> str | None:
    if value is None:
        return None
    from torch._inductor import list_mode_options

    return _one_of(*list_mode_options(), instead="None | ")(name, value)


def _inductor(name: str, value: Any) -> dict[str, Any]:
    allowed = "a dict of torch._inductor.config entries, for example {'max_autotune': True}"
    if not isinstance(value, Mapping):
        raise wrong_type(name, value, allowed)
    if not value:
        return {}
    from torch._inductor import config

    known = config.get_config_copy()
    for key in value:
        if key not in known:
            hint = nearest(str(key), known)
            raise OptionValueError(
                f"liteattention option {name!r} has the unknown key {key!r}; allowed: {allowed}.{hint}"
            )
    return dict(value)


class LayerNames(NamedTuple):
    """Which layers the options allow."""

    included: tuple[str, ...]
    excluded: tuple[str, ...]

    def allow(self, layer: str) -> bool:
        """Whether a layer of this name may be rewritten."""
        return self._matches(layer, self.included) and not self._matches(layer, self.excluded)

    @staticmethod
    def _matches(layer: str, globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(layer, glob) for glob in globs)


@dataclass(frozen=True)
class Options:
    """Validated options; the only place where their names, defaults and types are written.

    Raises:
        OptionTypeError: (a `TypeError`) a value has the wrong type.
        OptionValueError: (a `ValueError`) a name is unknown or a value is out of range.
    """

    threshold: float | Thresholds = _option(
        -10.0,
        check_threshold,
        "How far below the running maximum of each of its rows a tile of QK^T must lie to be skipped from the next "
        "step on, in log2 units (<= 0). More negative is more careful; -inf skips only what a mask hides. A number, a "
        "Schedule or a list of numbers over the trajectory, or a dict of these by layer-name globs.",
    )
    criterion: Criterion = _option(
        "max",
        _one_of(*CRITERIA),
        "What the threshold limits. 'max': how near the heaviest key of a skipped tile may come to its row's. 'mass': "
        "it is the log2 of how much of a row's softmax may be skipped in a generation, all tiles together, each "
        "measured when it is marked.",
    )
    dense_steps: DenseSteps = _option(
        DenseSteps(),
        _dense_steps,
        "The first and last steps that compute everything and mark nothing: integers count steps, floats are shares of "
        "the trajectory. How many steps there are is known from lite_compile.generation(model, steps=...) or from the "
        "generation before; else a count of last steps has no effect.",
    )
    refresh_every: int | None = _option(
        None,
        _integer_or_none(1, 2**30),
        "Every so many steps of a generation one step computes everything and marks anew, so that a tile that matters "
        "again is found. None: marks stay until the generation ends.",
    )
    min_seq_len: int | Literal["auto"] = _option(
        "auto",
        _integer_or_auto(1, 2**31 - 1),
        "Attention over fewer tokens than this stays dense. 'auto': the length from which on the kernel that would be "
        "used is faster than dense attention once some 40 % of the tiles are skipped (1024 to 4096). It also leaves "
        "blocks dense that have so little work that the host is what is waited for.",
    )
    max_streams: int = _option(
        4,
        _integer(1, 64),
        "Guidance streams (model calls on the same latents within one step) that get a mask of their own. Calls beyond "
        "that many run dense.",
    )
    layers: tuple[str, ...] = _option(("*",), _globs, "Globs: only layers whose name matches one are rewritten.")
    exclude_layers: tuple[str, ...] = _option((), _globs, "Globs: layers whose name matches one stay dense.")
    dense_layers: DenseLayers = _option(
        NO_DENSE_LAYERS,
        check_dense_layers,
        "Layers that skip nothing: globs, or a pair (first, last) that counts layers from the model's ends.",
    )
    kernel: KernelName = _option(
        "auto",
        _one_of("auto", "hopper", "triton", "cpu"),
        "Which kernel computes the rewritten attention. 'auto' takes 'hopper' where it can (compute capability 9.0, 16 "
        "bits, head dims up to 128 that are multiples of 8), else the portable 'triton', and 'cpu' on CPUs. Compiling "
        "raises an error where the one asked for cannot be used.",
    )
    qk_dtype: Literal["int8", "fp8"] | None = _option(
        None,
        _qk_dtype,
        "8-bit dtype that q and k are rounded to for their product: faster and less exact; softmax and the product "
        "with v keep the model's dtype. For the kernel for Hopper; compiling raises an error where it cannot be used.",
    )
    protect: tuple[Positions, ...] | Literal["auto"] = _option(
        "auto",
        _protect,
        "Positions (start, end) whose tiles are always computed, in the sequence of each rewritten layer; negative "
        "ones count from the end. 'auto' finds the text in joint attention.",
    )
    must_compute: tuple[Positions, ...] | None = _option(
        None,
        check_ranges,
        "Ranges (start, end) of keys whose tiles are always computed, in the sequence of each rewritten layer. None: "
        "there are none; a list, also an empty one: lite_compile.set_ranges can change them without compiling anew.",
    )
    must_skip: tuple[Positions, ...] | None = _option(
        None,
        check_ranges,
        "Ranges (start, end) of keys that are never attended to, in the same manner, as if a mask hid them.",
    )
    history: bool = _option(
        False,
        _boolean,
        "Whether the graph also writes down the density of each step, for `stats()`, `plot()` and `save_report()`.",
    )
    probe: bool = _option(
        False,
        _boolean,
        "Whether the graph also measures, on sampled queries, the softmax mass that each layer drops at each step, for "
        "`stats()`, `plot()` and `save_report()`.",
    )
    fuse_rotary: bool = _option(
        True,
        _boolean,
        "Whether, on GPUs and from 2^24 elements of q on, RMS norm and rotary embedding of q and k become one kernel "
        "of ours, which reads and writes memory once, where the graph spells them in a known way.",
    )
    fuse_gelu: bool = _option(
        True,
        _boolean,
        "Whether, on GPUs and from 2^24 elements on, GELU by the tanh formula is part of the linear layer before it.",
    )
    fuse_layer_norm: bool = _option(
        True,
        _boolean,
        "Whether, on GPUs and from 2^24 elements on, layer norm, the gated residual before it and the modulation after "
        "it become one kernel of ours, which reads and writes memory once, where the graph spells them in a known way.",
    )
    inner: Inner = _option(
        "inductor", _one_of("inductor", "aot_eager", "eager"), "What compiles the graph after our passes."
    )
    mode: str | None = _option(
        None, _mode, "Inductor mode, as in torch.compile(mode=...): 'reduce-overhead', 'max-autotune', ..."
    )
    inductor: dict[str, Any] = field(
        default_factory=dict,
        metadata={"check": _inductor, "doc": "Entries of torch._inductor.config for this compilation."},
    )
    on_unsupported: OnUnsupported = _option(
        "dense",
        _one_of("dense", "error"),
        "What to do with attention that should be rewritten and cannot be: leave it 'dense', or raise an 'error'.",
    )

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            checked = entry.metadata["check"](entry.name, getattr(self, entry.name))
            object.__setattr__(self, entry.name, checked)
        check_disjoint(self.ranges)
        if self.inner != "inductor" and (self.mode not in (None, "default") or self.inductor):
            name = "inductor" if self.inductor else "mode"
            raise OptionValueError(
                f"liteattention option {name!r} is {getattr(self, name)!r}, but inner={self.inner!r} does not run "
                "Inductor; allowed: inner='inductor', or leave it out"
            )

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Options from what `torch.compile` hands to a backend."""
        if options is not None and not isinstance(options, Mapping):
            raise OptionTypeError(f"liteattention options are {options!r}; allowed: a dict")
        given = dict(options or {})
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise OptionValueError(
                    f"unknown liteattention option {name!r} (value {given[name]!r}); allowed: {', '.join(known)}."
                    f"{nearest(str(name), known)}"
                )
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    @property
    def thresholds(self) -> Thresholds:
        """`threshold` as one kind of object."""
        return as_thresholds(self.threshold)

    @property
    def ranges(self) -> KeyRanges:
        """`must_compute` and `must_skip` together."""
        return KeyRanges(self.must_compute, self.must_skip)

    @property
    def names(self) -> LayerNames:
        """`layers` and `exclude_layers` together."""
        return LayerNames(self.layers, self.exclude_layers)

    def inductor_config(self) -> dict[str, Any]:
        """Inductor configuration that `mode` and `inductor` stand for."""
        from torch._inductor import list_mode_options

        patches = dict(list_mode_options(self.mode)) if self.mode else {}
        return {**patches, **self.inductor}
