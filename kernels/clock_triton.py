"""The step clock in Triton: a launch per latent and per conditioning input, and one that decides.

`clock.advance` is the specification, and says what the numbers mean; as hundreds of small operators it takes the GPU,
and more so the host, longer than it should. Fingerprints are rounded otherwise, so a clock has to be advanced by one of
the two for as long as it lives.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import clock as specification
from .. import ops, trajectory
from ..trajectory import DenseSteps
from .clock_inputs_triton import (
    COSINE,
    DIFFERS,
    FINITE,
    HEADER_WORDS,
    IDENTICAL,
    LARGEST_FLOAT,
    PROJECTIONS,
    SAMPLES,
    VERDICTS,
    compare_latents,
    project,
)  # fmt: skip
from .launch import Launch, Launcher, address_of
from .scratch import Scratch

MAX_PROGRAMS, LEAST_WORK = 512, 4096
"""Per conditioning input, and elements of the longest that are worth another one."""

_GENERATION = tl.constexpr(specification.GENERATION)
_STEP = tl.constexpr(specification.STEP)
_SLOT = tl.constexpr(specification.SLOT)
_CALLS = tl.constexpr(specification.CALLS)
_DENSE_CALLS = tl.constexpr(specification.DENSE_CALLS)
_RESET = tl.constexpr(specification.RESET)
_TIMESTEP = tl.constexpr(specification.TIMESTEP)
_NUMEL = tl.constexpr(specification.NUMEL)
_EPOCH = tl.constexpr(specification.EPOCH)
_UNDECIDED = tl.constexpr(specification.UNDECIDED)
_DIRECTION = tl.constexpr(specification.DIRECTION)
_FIRST_TIMESTEP = tl.constexpr(specification.FIRST_TIMESTEP)
_TIME_SCALE = tl.constexpr(specification.TIME_SCALE)
_LAST_STEPS = tl.constexpr(specification.LAST_STEPS)
_ANNOUNCED_STEPS = tl.constexpr(specification.ANNOUNCED_STEPS)
_SLOT_ROWS = tl.constexpr(specification.SLOT_ROWS)
_CONDITION_WORDS = tl.constexpr(specification.CONDITION_WORDS)
_NEXT_STEP_COSINE = tl.constexpr(specification.NEXT_STEP_COSINE)
_RISING_COSINE = tl.constexpr(specification.RISING_COSINE)
_SAME_TIMESTEP_COSINE = tl.constexpr(specification.SAME_TIMESTEP_COSINE)
_PERHAPS_RISING = tl.constexpr(specification.PERHAPS_RISING)
_FALLS = tl.constexpr(trajectory.FALLS)
_RISES = tl.constexpr(trajectory.RISES)
_THOUSANDS = tl.constexpr(trajectory.THOUSANDS)
_UNIT = tl.constexpr(trajectory.UNIT)
_LARGEST_FIRST_RISE = tl.constexpr(trajectory.LARGEST_FIRST_RISE)
_UNKNOWN = tl.constexpr(trajectory.UNKNOWN)
_NOW_EPOCH = tl.constexpr(ops.NOW_EPOCH)
_NOW_STEP = tl.constexpr(ops.NOW_STEP)
_NOW_SLOT = tl.constexpr(ops.NOW_SLOT)
_NOW_GENERATION = tl.constexpr(ops.NOW_GENERATION)
_NOW_FRACTION = tl.constexpr(ops.NOW_FRACTION)


@triton.jit
def _fingerprint(partials, number, PROGRAMS: tl.constexpr):
    """Lower and upper int32 words of the projections of one conditioning input, `[PROJECTIONS]` each."""
    row, column = tl.arange(0, PROGRAMS), tl.arange(0, PROJECTIONS)
    part = tl.load(partials + (number * PROGRAMS + row[:, None]) * PROJECTIONS + column[None, :])
    bits = tl.sum(part, 0).to(tl.int64, bitcast=True)
    return (bits & 0xFFFFFFFF).to(tl.int32), (bits >> 32).to(tl.int32)


@triton.jit
def _largest_time(timestep, count):
    """float32 maximum of the timesteps; NaN if one is."""
    place = tl.arange(0, 1024)
    largest = tl.full([1024], float("-inf"), tl.float32)
    strange = tl.zeros([1024], tl.int32)
    for start in range(0, count, 1024):
        inside = start + place < count
        value = tl.load(timestep + start + place, mask=inside, other=0).to(tl.float32)
        strange |= (value != value).to(tl.int32)
        largest = tl.maximum(largest, tl.where(inside & (value == value), value, float("-inf")))
    return tl.where(tl.max(strange, 0) > 0, float("nan"), tl.max(largest, 0))


@triton.jit
def _is_finite(x):
    return tl.abs(x) <= LARGEST_FLOAT


@triton.jit(
    do_not_specialize=[
        "latents", "conditions", "numel", "times", "max_streams", "refresh_every", "dense_first", "dense_last",
    ],
    do_not_specialize_on_alignment=["clock", "samples", "verdicts", "partials", "timestep", "now"],
)  # fmt: skip
def decide(
    clock, samples, verdicts, partials, timestep, now,
    latents, conditions, numel, times, max_streams, refresh_every, dense_first, dense_last,
    SLOTS: tl.constexpr, PROGRAMS: tl.constexpr, COUNT_FIRST: tl.constexpr, COUNT_LAST: tl.constexpr,
):  # fmt: skip
    """What `clock.advance` decides, given samples and projections. One program.

    Args:
        samples, verdicts: of `compare_latents`, the latter float32 `[latents, 4]`.
        partials: of `project`, float64 `[conditions, PROGRAMS, PROJECTIONS]`.
        timestep: `[times]`.
        now: int32 `[NOW_WORDS]`, written.
        dense_first, dense_last: as in `DenseSteps`, int32, where COUNT_...; else float32, the fractions up to which and
            from which on steps are dense.
        SLOTS: power of two, not below `max_streams`.
    """
    generation = tl.load(clock + _GENERATION)
    step = tl.load(clock + _STEP)
    was_undecided = tl.load(clock + _UNDECIDED) != 0
    direction = tl.load(clock + _DIRECTION)
    epoch_count = tl.load(clock + _EPOCH)
    calls, dense_calls = tl.load(clock + _CALLS), tl.load(clock + _DENSE_CALLS)
    last_steps, announced = tl.load(clock + _LAST_STEPS), tl.load(clock + _ANNOUNCED_STEPS)
    last_t = tl.load(clock + _TIMESTEP).to(tl.float32, bitcast=True)
    first_t = tl.load(clock + _FIRST_TIMESTEP).to(tl.float32, bitcast=True)
    scale = tl.load(clock + _TIME_SCALE).to(tl.float32, bitcast=True)
    started = (generation > 0) & (tl.load(clock + _RESET) == 0) & (tl.load(clock + _NUMEL) == numel)
    t = _largest_time(timestep, times)

    cosine, identical, differs, finite = 2.0, 1.0, 0.0, 1.0
    for i in range(latents):
        verdict = verdicts + VERDICTS * i
        cosine = tl.minimum(cosine, tl.load(verdict + COSINE))
        identical = tl.minimum(identical, tl.load(verdict + IDENTICAL))
        differs = tl.maximum(differs, tl.load(verdict + DIFFERS))
        finite = tl.minimum(finite, tl.load(verdict + FINITE))

    slot = tl.arange(0, SLOTS)
    live = slot < max_streams
    table = clock + HEADER_WORDS + slot
    slot_generation = tl.load(table, mask=live, other=0)
    slot_step = tl.load(table + max_streams, mask=live, other=0)
    slot_epoch = tl.load(table + 2 * max_streams, mask=live, other=0)
    slot_dense = tl.load(table + 3 * max_streams, mask=live, other=0)
    slot_began = tl.load(table + 4 * max_streams, mask=live, other=0)
    stored = clock + HEADER_WORDS + _SLOT_ROWS * max_streams
    column = 2 * tl.arange(0, PROJECTIONS)
    known = stored + 2 * SAMPLES + slot[:, None] * (conditions * _CONDITION_WORDS) + column[None, :]
    is_known = tl.where(live, 1, 0)
    for i in range(conditions):
        low, high = _fingerprint(partials, i, PROGRAMS)
        at = known + i * _CONDITION_WORDS
        known_low = tl.load(at, mask=live[:, None], other=0)
        known_high = tl.load(at + 1, mask=live[:, None], other=0)
        equal = (known_low == low[None, :]) & (known_high == high[None, :])
        is_known = tl.minimum(is_known, tl.min(equal.to(tl.int32), 1))
    known_now = is_known > 0

    delta = t - last_t
    moved = started & (identical == 0) & (differs > 0) & _is_finite(t) & _is_finite(last_t) & (finite > 0)
    moved_on = moved & (cosine >= _NEXT_STEP_COSINE)
    falls = (delta < 0) & ((direction == 0) | (direction == _FALLS))
    rises = (delta > 0) & ((direction == _RISES) | ((direction != _FALLS) & (cosine >= _RISING_COSINE)))
    next_step = moved_on & (falls | rises)
    perhaps_rising = moved_on & (delta > 0) & ((direction == 0) | (direction == _PERHAPS_RISING))
    again = moved & (delta == 0) & (cosine >= _SAME_TIMESTEP_COSINE) & (step > 0)
    seen_slots = live & known_now & (slot_generation == generation) & (slot_step == step)
    seen = tl.max(seen_slots.to(tl.int32), 0) > 0
    same_step = started & (identical > 0) & (delta == 0) & ((step != 0) | (seen == 0))
    undecided = again | (same_step & was_undecided)
    new = (same_step | next_step | again) == 0

    last_steps = tl.where(new & (generation > 0), step + 1, last_steps)
    generation += new.to(tl.int32)
    step = tl.where(new, 0, step + next_step.to(tl.int32))
    sign = (delta > 0).to(tl.int32) - (delta < 0).to(tl.int32)
    direction = tl.where(next_step, sign, direction)
    direction = tl.where(new, _PERHAPS_RISING * perhaps_rising.to(tl.int32), direction)
    first_t = tl.where(new, t, first_t)
    is_large = (t > _UNIT) | (scale == _THOUSANDS) | ((scale == 0) & (t - first_t > _LARGEST_FIRST_RISE))
    scale = tl.where(direction == _RISES, tl.where(is_large, _THOUSANDS, _UNIT), 0.0)
    noise = tl.where(direction == _RISES, scale - t, t)
    most = tl.where(direction == _RISES, scale - first_t, first_t)
    fraction = 1 - tl.div_rn(noise, most)
    placed = _is_finite(fraction) & (most > 0) & (noise >= 0) & ((direction == _RISES) | (direction == _FALLS))
    fraction = tl.where(placed, tl.minimum(tl.maximum(fraction, 0.0), 1.0), _UNKNOWN)
    fraction = tl.where(step == 0, 0.0, fraction)
    steps = tl.where(announced > 0, announced, last_steps)
    dense = step < dense_first if COUNT_FIRST else (fraction < dense_first) & (dense_first > 0)
    if COUNT_LAST:
        dense |= (step >= steps - dense_last) & (step < steps)
    else:
        dense |= ((fraction >= dense_last) | (fraction < 0)) & (dense_last < 1)

    current = slot_generation == generation
    matches = current & (slot_step < step) & known_now
    idle = current & (slot_step < step - 1)
    rank = tl.where(matches, 0, tl.where(current, tl.where(idle, 2, 3), 1))
    best = tl.min(tl.where(live, rank * max_streams + slot, 4 * max_streams), 0)
    usable = (best < 3 * max_streams) & (undecided == 0)
    chosen = tl.where(usable, best % max_streams, -1)
    taken = slot == chosen
    begins = tl.where(taken, best, -1) >= max_streams
    divisor = tl.maximum(refresh_every, 1)
    due = (refresh_every > 0) & (step // divisor > slot_step // divisor)
    renewed = begins | (taken & due)
    epoch_count += tl.max(renewed.to(tl.int32), 0)
    slot_epoch = tl.where(renewed, epoch_count, slot_epoch)
    epoch = tl.sum(tl.where(taken, slot_epoch, 0), 0)
    used = tl.where(dense, -1, chosen)

    tl.debug_barrier()  # what other warps read above is written below
    tl.store(clock + _GENERATION, generation)
    tl.store(clock + _STEP, step)
    tl.store(clock + _SLOT, chosen)
    tl.store(clock + _CALLS, calls + 1)
    tl.store(clock + _DENSE_CALLS, dense_calls + (used < 0).to(tl.int32))
    tl.store(clock + _RESET, 0)
    tl.store(clock + _TIMESTEP, t.to(tl.int32, bitcast=True))
    tl.store(clock + _NUMEL, numel)
    tl.store(clock + _EPOCH, epoch_count)
    tl.store(clock + _UNDECIDED, undecided.to(tl.int32))
    tl.store(clock + _DIRECTION, direction)
    tl.store(clock + _FIRST_TIMESTEP, first_t.to(tl.int32, bitcast=True))
    tl.store(clock + _TIME_SCALE, scale.to(tl.int32, bitcast=True))
    tl.store(clock + _LAST_STEPS, last_steps)
    tl.store(table, tl.where(taken, generation, slot_generation), mask=live)
    tl.store(table + max_streams, tl.where(taken, step, slot_step), mask=live)
    tl.store(table + 2 * max_streams, slot_epoch, mask=live)
    tl.store(table + 3 * max_streams, tl.where(taken, dense.to(tl.int32), slot_dense), mask=live)
    tl.store(table + 4 * max_streams, tl.where(begins, epoch_count, slot_began), mask=live)
    index = tl.arange(0, SAMPLES)
    sample = tl.load(samples + index).to(tl.int32, bitcast=True)
    tl.store(stored + index, sample)
    tl.store(stored + SAMPLES + index, sample, mask=index < tl.where(new, SAMPLES, 0))
    for i in range(conditions):
        low, high = _fingerprint(partials, i, PROGRAMS)
        at = known + i * _CONDITION_WORDS
        tl.store(at, low[None, :] + tl.zeros_like(slot)[:, None], mask=begins[:, None])
        tl.store(at + 1, high[None, :] + tl.zeros_like(slot)[:, None], mask=begins[:, None])
    tl.store(now + _NOW_EPOCH, epoch)
    tl.store(now + _NOW_STEP, step)
    tl.store(now + _NOW_SLOT, used)
    tl.store(now + _NOW_GENERATION, generation)
    tl.store(now + _NOW_FRACTION, fraction.to(tl.int32, bitcast=True))


_compare, _project, _decide = map(Launcher, (compare_latents, project, decide))


class _Kind(NamedTuple):
    """What compiled kernels distinguish of an input."""

    dtype: torch.dtype
    is_large: bool
    """Whether positions in it are computed in 64 bits."""
    is_longer: bool
    """Whether its size does not fit 32 bits, so that Triton takes it as int64: another variant."""


def _kind_of(x: Tensor) -> _Kind:
    return _Kind(x.dtype, x.numel() >= 2**30, x.numel() >= 2**31)


class _Plan(NamedTuple):
    """What follows from the number and kinds of inputs."""

    scratch: Scratch
    """`samples`, `verdicts`, `partials`."""
    compare: tuple[Launch, ...]
    project: tuple[Launch, ...]
    decide: Launch

    @property
    def ready(self) -> bool:
        """Whether all is compiled, so that addresses do."""
        return self.decide.ready and all(launch.ready for launch in (*self.compare, *self.project))


@functools.lru_cache(256)
def _plan(
    device: int, latents: tuple[_Kind, ...], timestep: torch.dtype, conditions: tuple[_Kind, ...], programs: int,
    max_streams: int, count_first: bool, count_last: bool,
) -> _Plan:  # fmt: skip
    scratch = Scratch.of(
        ((specification.LATENT_SAMPLES,), torch.float32), ((len(latents), VERDICTS.value), torch.float32),
        ((len(conditions), programs, specification.PROJECTIONS), torch.float64),
    )  # fmt: skip
    constants = {
        "SLOTS": triton.next_power_of_2(max_streams), "PROGRAMS": programs,
        "COUNT_FIRST": count_first, "COUNT_LAST": count_last,
    }  # fmt: skip
    narrow = (torch.float16, torch.bfloat16)
    return _Plan(
        scratch,
        tuple(_compare.variant(device, kind, {"IS_LARGE": kind.is_large}, num_warps=16) for kind in latents),
        tuple(
            _project.variant(device, kind, {"BLOCK": 1024, "IS_WIDE": kind.dtype not in narrow}, num_warps=8)
            for kind in conditions
        ),
        _decide.variant(device, timestep, constants, num_warps=8),
    )


def advance_triton(
    clock: Tensor, latents: Sequence[Tensor], timestep: Tensor, conditions: Sequence[Tensor], max_streams: int,
    dense_steps: DenseSteps, refresh_every: int,
) -> Tensor:  # fmt: skip
    """`clock.advance`.

    Args:
        clock: int32, contiguous; written.
        latents: tensors of any shape, a batch entry per element of the first dimension.
        timestep: up to `clock_op.MAX_TIMES` elements.
        conditions: one or more tensors; contiguous like the latents and timestep, on the clock's device, of dtypes in
            `clock_op.LOADED`.
        max_streams, dense_steps, refresh_every: as `clock.advance` takes them.
    """
    first, last = dense_steps
    longest = max(x.numel() for x in conditions)
    programs = min(MAX_PROGRAMS, triton.next_power_of_2(max(1, longest // LEAST_WORK)))
    plan = _plan(
        clock.get_device(), tuple(map(_kind_of, latents)), timestep.dtype, tuple(map(_kind_of, conditions)), programs,
        max_streams, isinstance(first, int), isinstance(last, int),
    )  # fmt: skip
    buffer, now = plan.scratch.allocate(clock.device), clock.new_empty(ops.NOW_WORDS)
    samples, verdicts, partials = (plan.scratch.addresses if plan.ready else plan.scratch.tensors)(buffer)
    given: tuple[Any, ...] = (clock, timestep, now, *latents, *conditions)
    clock_at, times_at, now_at, *inputs = map(address_of, given) if plan.ready else given
    share, slots = specification.LATENT_SAMPLES // len(latents), specification.SLOT_ROWS * max_streams
    with torch.cuda.device_of(clock):
        for i, (x, launch) in enumerate(zip(latents, plan.compare, strict=True)):
            span = share if i + 1 < len(latents) else specification.LATENT_SAMPLES - i * share
            entries = min(x.shape[0], specification.MAX_ENTRIES)
            launch((1, 1, 1), (inputs[i], clock_at, samples, verdicts, i, x.numel(), entries, share, span, slots))
        for i, (x, launch) in enumerate(zip(conditions, plan.project, strict=True)):
            launch((programs, 1, 1), (inputs[len(latents) + i], partials, i, x.numel()))
        sizes = (len(latents), len(conditions), sum(x.numel() for x in latents) % 2**31, timestep.numel())
        rules = (max_streams, refresh_every, first, last if isinstance(last, int) else 1 - last)
        plan.decide((1, 1, 1), (clock_at, samples, verdicts, partials, times_at, now_at, *sizes, *rules))
    return now
