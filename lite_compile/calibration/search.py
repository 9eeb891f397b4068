"""Find the boldest thresholds that keep the budget, in one generation, on its own sparse trajectory.

A mark made at one step takes effect at the next. So a threshold is chosen a step late: each call of a layer leaves
several copies of its state, marked under one candidate threshold each, and the next call of the same stream takes the
boldest copy under whose mask *its* output keeps *its* step's budget. That is the error which the threshold will cause
when the schedule is used; nothing is predicted. The output of that copy is passed on, so all later layers and steps see
the sparse trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_error import attention_error
from .budget import Budget
from .intercept import AttendCall
from .points import Points

FLOOR = -30.0
"""The most careful candidate: what it skips weighs nothing, and unlike -inf it can be interpolated."""
FIRST: tuple[float, ...] = (-14.0, -10.0, -7.0, -4.5, -2.5, 0.0)
AROUND: tuple[float, ...] = (-3.0, -1.0, 0.0, 1.5)
"""Later candidates, from the layer's last threshold."""
BELOW: tuple[float, ...] = (-3.0, -1.0, 0.0)
"""Candidates from what earlier prompts allow."""

Cap = Callable[[str, float], float]


@dataclass
class _Option:
    """A copy of a stream's state, marked under one threshold."""

    threshold: float
    rows: Tensor
    """int32 `[1, B, H, q_tiles, row_words]`."""


@dataclass
class _Stream:
    """What is known of one guidance stream of one layer after a call."""

    epoch: int
    fraction: float
    options: list[_Option]
    """From careful to bold."""
    chosen: _Option | None = None
    """The state that the call used, as it was before it, and the threshold that it was marked under."""
    rejected: Sequence[_Option] = ()
    """More careful ones than that."""
    before: float = 0.0
    """Fraction of the call that marked them."""


class ThresholdSearch:
    """Handler for `intercepted` that finds thresholds while one generation runs.

    Of several guidance streams the most careful threshold counts; a stream that went further goes back to it.
    """

    def __init__(self, budget: Budget, margin: float, cap: Cap | None = None) -> None:
        self._budget, self._margin, self._cap = budget, margin, cap
        self.found: Points = {}
        """Thresholds by layer and fraction, log2 units."""
        self.layers: dict[str, str] = {}
        """The criterion of all layers that ran, those included that never used a state."""
        self._streams: dict[tuple[int, int], _Stream] = {}
        self._candidates: dict[tuple[str, float], list[float]] = {}
        self._centre: dict[str, float] = {}
        self.kernel_calls = 0
        """How often attention was computed."""

    def __call__(self, layer: str, call: AttendCall) -> None:
        self.layers[layer] = call.criterion
        if not call.uses_state:
            call.attend(call.threshold)
            self.kernel_calls += 1
            return
        if call.fraction < 0:
            raise RuntimeError(
                f"layer {layer!r}: the clock does not know how far the generation is, so thresholds would have no "
                "place; see 'the fraction of the trajectory' in docs/options.md (timesteps that are negative, or "
                "announced without their number: use lite_compile.generation(model, steps=N))"
            )
        key = (call.state.data_ptr(), call.slot)
        stream = self._streams.get(key)
        if stream is None or stream.epoch != call.epoch:
            # Its masks are void, whatever the rows hold.
            stream = _Stream(call.epoch, call.fraction, [_Option(math.nan, torch.zeros_like(call.copy_rows()))])
            chosen, rejected = stream.options[0], list[_Option]()
            marked = _Option(self._ladder(layer, call.fraction)[0], chosen.rows.clone())
            self._attend(call, marked, call.out)
        else:
            self._go_back(layer, stream, call)
            chosen, rejected, marked = self._choose(layer, stream, call)
        call.state[call.slot].copy_(marked.rows[0])
        options = [_Option(FLOOR, chosen.rows.clone())]  # marks nothing
        scratch = torch.empty_like(call.out)
        for threshold in self._ladder(layer, call.fraction):
            if threshold == marked.threshold:
                options.append(marked)
                continue
            options.append(_Option(threshold, chosen.rows.clone()))
            self._attend(call, options[-1], scratch)
        self._streams[key] = _Stream(call.epoch, call.fraction, options, chosen, rejected, stream.fraction)

    def _attend(self, call: AttendCall, option: _Option, out: Tensor) -> None:
        """Attention under the mask in the rows, which are marked under the option's threshold."""
        call.attend(torch.full_like(call.threshold, option.threshold), option.rows, out)
        self.kernel_calls += 1

    def _choose(self, layer: str, stream: _Stream, call: AttendCall) -> tuple[_Option, list[_Option], _Option]:
        """The boldest option that keeps the budget, those below it, and what the call marks beyond it; writes `out`."""
        found = self.found.setdefault(layer, {})
        limit = found.get(stream.fraction, 0.0)  # what another stream of that step, or generation of this run, found
        options = [option for i, option in enumerate(stream.options) if i == 0 or option.threshold <= limit]
        budget = self._budget.at(call.fraction) * self._margin
        dense = call.attend_densely(torch.empty_like(call.out))
        self.kernel_calls += 1
        errors: dict[int, float] = {}
        kept: dict[int, tuple[Tensor, _Option, Tensor | None]] = {}

        def measure(index: int) -> float:
            option, out = options[index], torch.empty_like(call.out)
            marked = _Option(self._lowest(layer, call.fraction, option.threshold), option.rows.clone())
            self._attend(call, marked, out)
            errors[index] = attention_error(out, dense, self._budget.metric)
            kept[index] = (out, marked, None if call.lse is None else call.lse.clone())
            return errors[index]

        # Of options with the same mask the boldest stands for all.
        start = call.mask_start
        tried = [
            index
            for index, option in enumerate(options)
            if index == len(options) - 1
            or not torch.equal(option.rows[..., start:], options[index + 1].rows[..., start:])
        ]
        lowest, highest = 0, len(tried) - 1
        at = self._first_probe(layer, [options[index].threshold for index in tried])
        while lowest < highest:
            if measure(tried[at]) <= budget:
                lowest = at
            else:
                highest = at - 1
            for index in [index for index in kept if index != tried[lowest]]:
                del kept[index]
            at = (lowest + highest + 1) // 2
        low = tried[lowest]
        if low not in kept:
            measure(low)
        out, marked, lse = kept[low]
        call.out.copy_(out)
        if call.lse is not None and lse is not None:
            call.lse.copy_(lse)
        if errors[low] <= budget:
            self._centre[layer] = options[low].threshold
        else:
            low = 0  # the same mask; what broke the budget was marked before
        threshold = options[low].threshold
        found[stream.fraction] = min(found.get(stream.fraction, 0.0), threshold)
        return options[low], options[:low], marked

    def _first_probe(self, layer: str, thresholds: Sequence[float]) -> int:
        """Which of them, rising, to measure first: the one that a layer keeps to most often."""
        last = len(thresholds) - 1
        if self._cap is not None or last == 0:
            return last
        if layer not in self._centre:
            return (last + 1) // 2
        return max(1, sum(threshold <= self._centre[layer] for threshold in thresholds) - 1)

    def _ladder(self, layer: str, fraction: float) -> list[float]:
        """Candidates above `FLOOR` for marks made at that fraction, rising; the same ones for all streams of a step."""
        key = (layer, fraction)
        if key not in self._candidates:
            self._candidates[key] = self._around(layer, fraction, self._centre.get(layer))
        return self._candidates[key]

    def _lowest(self, layer: str, fraction: float, centre: float) -> float:
        """The lowest candidate for marks made at that fraction if `centre` is what the layer keeps to."""
        known = self._candidates.get((layer, fraction))
        return (known or self._around(layer, fraction, max(FLOOR, centre)))[0]

    def _around(self, layer: str, fraction: float, centre: float | None) -> list[float]:
        if self._cap is not None:
            centre, offsets = self._cap(layer, fraction), BELOW
        elif centre is not None:
            offsets = AROUND
        else:
            centre, offsets = 0.0, FIRST
        values = sorted({min(0.0, centre + offset) for offset in offsets})
        return [value for value in values if value > FLOOR] or [FLOOR]

    def _go_back(self, layer: str, stream: _Stream, call: AttendCall) -> None:
        """If another stream found a more careful threshold since, take back what this one marked beyond it."""
        if stream.chosen is None or math.isnan(stream.chosen.threshold):
            return
        limit = self.found[layer][stream.before]
        if stream.chosen.threshold <= limit:
            return
        careful = [option for option in stream.rejected if option.threshold <= limit][-1].rows
        start = call.mask_start
        had, has = stream.chosen.rows[..., start:], careful[..., start:]
        for option in stream.options:
            bits = option.rows[..., start:]
            bits.copy_((bits & ~had) | has)
