"""Where in its trajectory a call stands, and which steps are dense, as the clock tells."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_clock import TIMES, TIMESTEP_KINDS, N, P, noise, trajectory
from torch import Tensor

from lite_compile.announce import clock_header, read_announced
from lite_compile.clock import ANNOUNCED_STEPS, DENSE_CALLS, RESET, advance, clock_words, slot_table
from lite_compile.ops import NOW_FRACTION, NOW_SLOT, NOW_STEP
from lite_compile.root_clock import dense_now
from lite_compile.trajectory import UNKNOWN, DenseSteps

STREAMS = 4


class Clock:
    """A clock and the calls made so far."""

    def __init__(self, dense_steps: Sequence[float] = (0, 0)) -> None:
        self.state = torch.zeros(clock_words(STREAMS, 1), dtype=torch.int32)
        self.dense_steps: Any = tuple(dense_steps)

    def call(self, latents: Tensor, t: float | Tensor, prompt: Tensor = P) -> Tensor:
        timestep = t if isinstance(t, Tensor) else torch.tensor([t])
        return advance(self.state, latents, timestep, [prompt], STREAMS, self.dense_steps)

    def fraction(self, latents: Tensor, t: float | Tensor, prompt: Tensor = P) -> float:
        return float(self.call(latents, t, prompt)[NOW_FRACTION].view(torch.float32))

    def run(self, steps: int, seed: int = 0, shift: float = 1.0) -> list[bool]:
        """Of a generation of so many steps: whether each was dense, for both streams alike."""
        times = shifted(steps, shift)
        found = []
        for x, t in zip(trajectory(seed, times), times, strict=True):
            slots = [int(self.call(x, t, prompt)[NOW_SLOT]) for prompt in (P, N)]
            assert slots in ([0, 1], [-1, -1])
            found.append(slots == [-1, -1])
        return found


def shifted(steps: int, shift: float) -> list[float]:
    """Timesteps of a flow-matching schedule from 1000 on."""
    sigmas = [1 - step / steps for step in range(steps)]
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [4, 30, 50])
def test_falling_time_is_the_noise_level(steps: int, shift: float) -> None:
    clock, times = Clock(), shifted(steps, shift)
    for generation in range(2):
        xs = trajectory(generation, times)
        found = [clock.fraction(x, t, p) for x, t in zip(xs, times, strict=True) for p in (P, N)]
        assert found == pytest.approx([1 - t / 1000 for t in times for _ in (P, N)], abs=1e-6)
        assert found[0] == 0.0


def test_runs_of_any_length_are_at_one_fraction_at_one_noise_level() -> None:
    found = {}
    for steps in (30, 50):
        clock, times = Clock(), shifted(steps, 3.0)
        found[steps] = {round(t, 3): clock.fraction(x, t) for x, t in zip(trajectory(0, times), times, strict=True)}
    common = found[30].keys() & found[50].keys()
    assert len(common) >= 10
    assert all(found[30][t] == pytest.approx(found[50][t], abs=1e-6) for t in common)


def test_video_to_video_begins_at_zero_and_ends_at_one() -> None:
    clock, times = Clock(), [600.0, 450.0, 300.0, 150.0, 0.0]
    found = [clock.fraction(x, t) for x, t in zip(trajectory(0, times), times, strict=True)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1.0], abs=1e-6)


@pytest.mark.parametrize("end", [1.0, 1000.0])
@pytest.mark.parametrize("start", [0.0, 0.4])
def test_rising_time_goes_to_one_or_to_a_thousand(end: float, start: float) -> None:
    """Lumina and Z-Image, and Mochi."""
    clock = Clock()
    levels = [start + (1 - start) * step / 10 for step in range(10)]
    for generation in range(2):
        xs = trajectory(generation, [1000 - 1000 * level for level in levels])
        found = [clock.fraction(x, end * level, p) for x, level in zip(xs, levels, strict=True) for p in (P, N)]
        assert found == pytest.approx([step / 10 for step in range(10) for _ in (P, N)], abs=1e-6)


def test_a_rise_of_less_than_one_may_be_one_of_a_thousand() -> None:
    """Mochi's schedule rises by 0.78 at first, and by more than 1 from the third step on."""
    clock, times = Clock(), [0.0, 0.78, 1.56, 2.3, 100.0, 300.0]
    xs = trajectory(0, [1000 - t for t in times])
    found = [clock.fraction(x, t) for x, t in zip(xs, times, strict=True)]
    assert found == pytest.approx([t / 1000 for t in times], abs=1e-6)


def test_a_scale_that_shows_later_holds_from_then_on() -> None:
    clock, times = Clock(), [0.0, 0.2, 0.6, 1.2, 40.0]
    xs = trajectory(0, [1000 - t for t in times])
    found = [clock.fraction(x, t) for x, t in zip(xs, times, strict=True)]
    assert found == pytest.approx([0.0, 0.2, 0.6, 0.0012, 0.04], abs=1e-6)  # the first two are too bold


def test_heun_stands_at_its_timestep_both_times() -> None:
    clock, (x, y, z, *_) = Clock(), trajectory(0, TIMES)
    assert clock.fraction(x, 1000.0) == 0.0
    assert clock.fraction(y, 800.0) == pytest.approx(0.2)
    second = clock.call(y + 0.02 * noise(9), 800.0)
    assert int(second[NOW_SLOT]) == -1
    assert float(second[NOW_FRACTION].view(torch.float32)) == pytest.approx(0.2)
    assert clock.fraction(z, 600.0) == pytest.approx(0.4)


@pytest.mark.parametrize("make", TIMESTEP_KINDS.values(), ids=TIMESTEP_KINDS)
def test_kinds_of_timestep(make: Callable[[float], Tensor]) -> None:
    clock = Clock()
    found = [clock.fraction(x, make(t)) for x, t in zip(trajectory(0, TIMES), TIMES, strict=True)]
    assert found == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-6)


def test_after_an_aborted_generation_the_next_begins_at_zero() -> None:
    clock, xs, others = Clock(), trajectory(0, TIMES), trajectory(1, TIMES)
    assert [clock.fraction(x, t) for x, t in zip(xs[:3], TIMES, strict=False)] == pytest.approx([0, 0.2, 0.4])
    assert clock.fraction(others[1], 800.0) == 0.0
    assert clock.fraction(others[2], 600.0) == pytest.approx(0.25)
    clock.state[RESET] = 1
    assert clock.fraction(others[3], 400.0) == 0.0
    assert clock.fraction(others[4], 200.0) == pytest.approx(0.5)


def test_logarithms_of_noise_levels_are_unknown_once_they_are_negative() -> None:
    clock, times = Clock(), [1.0, 0.5, -0.5, -1.0]
    found = [clock.fraction(x, t) for x, t in zip(trajectory(0, TIMES), times, strict=False)]
    assert found == pytest.approx([0, 0.5, UNKNOWN, UNKNOWN])
    clock = Clock()
    found = [clock.fraction(x, t) for x, t in zip(trajectory(0, TIMES), (-1.0, -2.0, -3.0), strict=False)]
    assert found == [0.0, UNKNOWN, UNKNOWN]


def test_a_timestep_that_stays_at_zero_is_unknown_or_the_beginning() -> None:
    clock, x = Clock(), noise(1)
    assert [clock.fraction(x + 0.01 * n * noise(2), 0.0) for n in range(3)] == [0.0, 0.0, 0.0]
    assert clock.fraction(noise(3), math.nan) == 0.0


def test_where_no_state_may_be_used_the_fraction_is_unknown() -> None:
    assert float(dense_now(torch.device("cpu"))[NOW_FRACTION].view(torch.float32)) == UNKNOWN


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (3, 0), (0.35, 0), (0, 0.35), (2, 0.2), (0.1, 0.1)])
def test_dense_steps_at_the_beginning_and_by_share(first: float, last: float) -> None:
    clock = Clock((first, last))
    for generation in range(2):
        found = clock.run(10, generation)
        levels = [step / 10 for step in range(10)]
        begin = [step < first if isinstance(first, int) else level < first - 1e-6 for step, level in enumerate(levels)]
        assert found == [a or (last > 0 and level >= 1 - last - 1e-6) for a, level in zip(begin, levels, strict=True)]


def test_last_steps_are_counted_once_the_number_of_steps_is_known() -> None:
    clock = Clock((1, 2))
    assert clock.run(6, 0) == [True, *[False] * 5]  # nobody knows yet
    assert clock.run(6, 1) == [True, False, False, False, True, True]
    assert clock.run(8, 2) == [True, False, False, False, True, True, False, False]  # more than last time
    assert clock.run(8, 3) == [True, *[False] * 5, True, True]
    clock.state[ANNOUNCED_STEPS] = 5
    assert clock.run(5, 4) == [True, False, False, True, True]
    clock.state[ANNOUNCED_STEPS] = 0
    assert clock.run(5, 5) == [True, False, False, True, True]


def test_dense_steps_keep_the_slots_and_their_epochs() -> None:
    clock = Clock((2, 0.3))
    dense = clock.run(10, 0)
    table = slot_table(clock.state, STREAMS)
    assert dense == [*[True] * 2, *[False] * 5, *[True] * 3]
    assert table[:, :2].tolist() == [[1, 1], [9, 9], [1, 2], [1, 1], [1, 2]]
    assert int(clock.state[DENSE_CALLS]) == 10
    clock.dense_steps = (0, 0)
    times = shifted(10, 1.0)
    assert int(clock.call(0.9 * trajectory(0, times)[-1], 50.0)[NOW_SLOT]) == 0
    assert slot_table(clock.state, STREAMS)[:, 0].tolist() == [1, 10, 1, 0, 1]


def test_shares_take_an_unknown_place_for_a_dense_one() -> None:
    for dense_steps, expected in (((0, 0), 0), ((1, 1), 0), ((0.1, 0), -1), ((0, 0.1), -1)):
        clock = Clock(dense_steps)
        for x, t in zip(trajectory(0, TIMES), (-1.0, -2.0), strict=False):
            slot = int(clock.call(x, t)[NOW_SLOT])
        assert slot == expected, dense_steps


def announced(step: int, steps: int, dense_steps: DenseSteps = DenseSteps()) -> tuple[int, int, float]:  # noqa: B008
    """`(step, slot, fraction)` of an announced call."""
    clock = torch.zeros(clock_words(STREAMS, 0), dtype=torch.int32)
    header = clock_header(3, 0, {0: step}, 1, steps)
    clock[: len(header)] = torch.tensor(header, dtype=torch.int32)
    now = read_announced(clock, STREAMS, dense_steps)
    return int(now[NOW_STEP]), int(now[NOW_SLOT]), float(now[NOW_FRACTION].view(torch.float32))


def test_announced_steps_are_a_fraction_of_the_announced_number() -> None:
    for step in range(5):
        assert announced(step, 5) == (step, 0, pytest.approx(step / 5))
        assert announced(step, 0) == (step, 0, UNKNOWN)
    assert announced(5, 5) == (5, 0, UNKNOWN)  # more than announced


def test_dense_steps_of_announced_generations() -> None:
    for steps, expected in ((5, [-1, 0, 0, 0, -1]), (0, [-1, 0, 0, 0, 0])):
        assert [announced(step, steps, DenseSteps(1, 1))[1] for step in range(5)] == expected
    assert [announced(step, 5, DenseSteps(0.3, 0.3))[1] for step in range(5)] == [-1, -1, 0, 0, -1]


@pytest.mark.parametrize("dense_steps", list(itertools.product((1, 0.1), (1, 0.1))), ids=str)
def test_nothing_is_read_back(dense_steps: tuple[float, float]) -> None:
    """Traced to one graph of tensor operations."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda c, x, t, p: advance(c, x, t, [p], STREAMS, dense_steps), tracing_mode="fake")(
        Clock().state, noise(1), torch.tensor([1.0]), P
    )
    targets = {str(node.target) for node in graph.graph.nodes}
    assert not any(name in target for target in targets for name in ("_local_scalar_dense", ".item", "nonzero"))
