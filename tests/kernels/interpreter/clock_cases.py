"""`advance_triton` in Triton's interpreter, call by call beside `clock.advance`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite_compile.clock import (
    ANNOUNCED_STEPS,
    CONDITION_WORDS,
    LATENT_SAMPLES,
    RESET,
    advance,
    clock_words,
    sample,
    sample_positions,
)
from lite_compile.clock_op import MAX_TIMES, _advance_cuda
from lite_compile.kernels.clock_inputs_triton import compare_latents
from lite_compile.kernels.clock_triton import advance_triton
from lite_compile.ops import NOW_GENERATION, NOW_SLOT, NOW_STEP
from lite_compile.trajectory import NONE_DENSE, DenseSteps

STREAMS = 3


class Pair:
    """Two clocks that are told the same."""

    def __init__(
        self, conditions: int = 1, streams: int = STREAMS, dense: DenseSteps = NONE_DENSE, refresh_every: int = 0
    ) -> None:
        self.clock = torch.zeros(clock_words(streams, conditions), dtype=torch.int32)
        self.expected_clock = self.clock.clone()
        self.streams, self.dense, self.refresh_every = streams, dense, refresh_every
        self.exact = self.clock.numel() - max(1, conditions) * CONDITION_WORDS * streams

    def call(self, latents: Sequence[Tensor], t: Tensor, *conditions: Tensor) -> Tensor:
        """Where the call stands; both say the same, and remember the same."""
        rules = (self.streams, self.dense, self.refresh_every)
        told = advance_triton(self.clock, latents, t, conditions, *rules)
        expected = advance(self.expected_clock, latents, t, conditions, *rules)
        assert told.tolist() == expected.tolist()
        assert torch.equal(self.clock[: self.exact], self.expected_clock[: self.exact])
        prints, expected_prints = (
            x[self.exact :].clone().view(torch.float64) for x in (self.clock, self.expected_clock)
        )
        torch.testing.assert_close(prints, expected_prints, rtol=1e-9, atol=1e-9)
        return told


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(time: float) -> Tensor:
    return torch.tensor([time])


@pytest.mark.parametrize(
    ("dense", "refresh_every"), [(NONE_DENSE, 0), (DenseSteps(1, 0.3), 2), (DenseSteps(0.25, 1), 0)], ids=str
)
def test_generations_of_two_streams(dense: DenseSteps, refresh_every: int) -> None:
    pair = Pair(2, dense=dense, refresh_every=refresh_every)
    seen = []
    for seed in (0, 1):
        start, drift = noise(seed, 1, 4, 20, 70), noise(seed + 10, 1, 4, 20, 70)
        for step in range(5):
            for text in (7, 8):
                now = pair.call([start + 0.1 * step * drift], at(1000.0 - 200 * step), noise(text, 3, 50), noise(9, 2))
                seen.append((int(now[NOW_GENERATION]), int(now[NOW_STEP])))
    assert seen == [(seed + 1, step) for seed in (0, 1) for step in range(5) for _ in (7, 8)]


@pytest.mark.parametrize("entries", [1, 2, 33])
def test_an_entry_of_a_batch_that_is_another_one(entries: int) -> None:
    pair = Pair()
    x = noise(0, entries, 300)
    assert int(pair.call([x], at(900.0), noise(7, 5))[NOW_GENERATION]) == 1
    assert int(pair.call([0.9 * x], at(800.0), noise(7, 5))[NOW_STEP]) == 1
    other = 0.8 * x
    other[-1] = noise(3, 300)
    assert int(pair.call([other], at(700.0), noise(7, 5))[NOW_GENERATION]) == 2


def test_several_latents() -> None:
    """Their samples leave some words over, and fewer latents than before leave them to the last one."""
    pair = Pair()
    xs = [noise(i, 2, 100 + i) for i in range(3)]
    for step in range(3):
        assert int(pair.call([x * (1 - 0.1 * step) for x in xs], at(900.0 - step), noise(7, 5))[NOW_STEP]) == step
    pair.call(xs[:2], at(800.0), noise(7, 5))
    pair.call([x * 0.9 for x in xs[:2]], at(700.0), noise(7, 5))


STRANGE = (math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0)


@pytest.mark.parametrize("place", ["latents", "timestep", "condition"])
def test_numbers_that_are_none(place: str) -> None:
    for value in STRANGE:
        pair = Pair()
        for step in range(4):
            x, t, text = noise(0, 1, 500) * (1 - 0.1 * step), at(900.0 - step), noise(7, 50)
            if step in (1, 2):
                {"latents": x[0], "timestep": t, "condition": text}[place][0] = value
            pair.call([x], t, text)


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    pair = Pair(1)
    texts = [(100 * noise(i, 3, 40)).abs().to(dtype) for i in (0, 1)]
    if dtype == torch.bool:
        texts[1] = ~texts[0]
    narrow = dtype if dtype.is_floating_point else torch.float32
    slots = []
    for step in range(2):
        for text in texts:
            x = ((1 - 0.1 * step) * noise(5, 1, 70)).to(narrow)
            slots.append(int(pair.call([x], torch.tensor([90 - step, 3], dtype=dtype), text)[NOW_SLOT]))
    assert slots == ([0, 1, 0, 1] if dtype != torch.bool else slots)


def test_one_word_of_a_long_prompt() -> None:
    text = noise(0, 9, 2000)  # more than one block for each of several programs
    for place in (0, 8191, 17999):
        pair, other = Pair(), text.clone()
        other.view(-1)[place] += 1
        x = noise(1, 1, 64)
        assert [int(pair.call([x], at(9.0), p)[NOW_SLOT]) for p in (text, other)] == [0, 1]
        assert [int(pair.call([0.9 * x], at(8.0), p)[NOW_SLOT]) for p in (other, text)] == [1, 0]


@pytest.mark.parametrize(("size", "is_large"), [(3, False), (10**6 + 3, False), (2**31 - 100, True)])
def test_samples_of_latents_of_any_size(size: int, is_large: bool) -> None:
    x = torch.zeros(size, dtype=torch.int8)  # memory that is not written to takes no room
    positions = sample_positions(size, LATENT_SAMPLES, x.device)
    x[positions[:: LATENT_SAMPLES // 64]] = 1
    x[positions[-1]] = 2
    clock = torch.zeros(clock_words(1, 1), dtype=torch.int32)
    samples, verdicts = torch.full((LATENT_SAMPLES,), math.nan), torch.empty(1, 4)
    count = LATENT_SAMPLES
    compare_latents[(1,)](x, clock, samples, verdicts, 0, size, 1, count, count, 5, IS_LARGE=is_large)
    assert torch.equal(samples, sample(x, LATENT_SAMPLES))
    assert samples[-1] == 2


def test_the_op_reads_elements_whatever_the_strides() -> None:
    """Views that leave elements out, repeat them or turn them around, and more timesteps than one program reads."""
    clock, expected_clock = (torch.zeros(clock_words(STREAMS, 4), dtype=torch.int32) for _ in range(2))
    texts = [noise(7, 60)[::2], noise(8, 1).expand(9), noise(9, 3, 20).mT, torch.tensor(4)]
    for step in range(3):
        x = noise(0, 8, 2, 90)[:, :, ::3].transpose(0, 1) * (1 - 0.1 * step)
        t = torch.tensor([[0.0], [900.0 - step]]).expand(2, MAX_TIMES if step == 2 else 4)
        x, wide = x.transpose(1, 2), noise(1, 2, 1).expand(2, 50) * (1 - 0.1 * step)
        assert not any(y.is_contiguous() for y in (x, t, *texts[:3]))
        told = _advance_cuda(clock, [x, wide], t, texts, STREAMS, 0.0, 0.0, True, True, 0)
        assert told.tolist() == advance(expected_clock, [x, wide], t, texts, STREAMS).tolist()
        assert int(told[NOW_STEP]) == step
        exact = clock.numel() - 4 * CONDITION_WORDS * STREAMS
        assert torch.equal(clock[:exact], expected_clock[:exact])
        prints, expected_prints = (x[exact:].clone().view(torch.float64) for x in (clock, expected_clock))
        torch.testing.assert_close(prints, expected_prints, rtol=1e-9, atol=1e-9)


def test_a_timestep_per_token() -> None:
    pair = Pair()
    for step in range(3):
        t = torch.zeros(2, 1500)
        t[1, 1400:] = 900.0 - step
        assert int(pair.call([noise(0, 2, 64) * (1 - 0.1 * step)], t, noise(7, 5))[NOW_STEP]) == step


PHASES = (Phase.explicit, Phase.generate)
"""Shrinking takes many minutes in the interpreter."""
MOVES = st.tuples(
    st.sampled_from([0.0, 0.01, 0.1, 0.6, 3.0]),  # how far the latents move
    st.sampled_from([-100.0, -1.0, 0.0, 0.1, 1.0, 100.0]),  # timestep
    st.integers(0, 4),  # prompt
    st.sampled_from(["", "", "", "", "", "", "reset", "back", "announce"]),
)


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    moves=st.lists(MOVES, min_size=2, max_size=12), streams=st.integers(1, 5), refresh_every=st.integers(0, 3),
    dense=st.sampled_from([NONE_DENSE, DenseSteps(2, 1), DenseSteps(0.1, 0.2), DenseSteps(1, 0.5)]),
    begin=st.sampled_from([1000.0, 1.0, 0.0, -3.0]),
)  # fmt: skip
def test_whatever_is_called(
    moves: list[tuple[float, float, int, str]], streams: int, refresh_every: int, dense: DenseSteps, begin: float
) -> None:
    pair = Pair(1, streams, dense, refresh_every)
    x = first = noise(0, 1, 128)
    t = begin
    for number, (far, later, text, event) in enumerate(moves):
        x = x + far * noise(100 + number, 1, 128)
        t += later
        if event == "back":
            x, t = first, begin
        for clock in (pair.clock, pair.expected_clock):
            if event == "reset":
                clock[RESET] = 1
            if event == "announce":
                clock[ANNOUNCED_STEPS] = 4
        pair.call([x], at(t), noise(200 + text, 6))
