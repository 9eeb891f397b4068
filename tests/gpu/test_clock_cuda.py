"""The kernels that advance the step clock, against `clock.advance` on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lite_compile.clock import CONDITION_WORDS, advance, clock_words
from lite_compile.ops import NOW_GENERATION, NOW_SLOT, NOW_STEP
from lite_compile.trajectory import NONE_DENSE, DenseSteps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STREAMS = 4
DEVICE = torch.device("cuda")
Condition = Tensor | int | float


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pair:
    """A clock on the GPU and one on the CPU, told the same."""

    def __init__(self, conditions: int = 1, dense: DenseSteps = NONE_DENSE, refresh_every: int = 0) -> None:
        self.expected_clock = torch.zeros(clock_words(STREAMS, conditions), dtype=torch.int32)
        self.clock = self.expected_clock.to(DEVICE)
        self.rules = (STREAMS, dense, refresh_every)
        self.exact = self.clock.numel() - max(1, conditions) * CONDITION_WORDS * STREAMS

    def call(self, latents: Sequence[Tensor], t: Tensor, *conditions: Condition) -> Tensor:
        """Where the call stands; both say the same, and remember the same."""
        there = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in conditions]
        told = advance(self.clock, [x.to(DEVICE) for x in latents], t.to(DEVICE), there, *self.rules).cpu()
        expected = advance(self.expected_clock, latents, t, conditions, *self.rules)
        assert told.tolist() == expected.tolist()
        assert torch.equal(self.clock[: self.exact].cpu(), self.expected_clock[: self.exact])
        prints, expected_prints = (
            x[self.exact :].clone().cpu().view(torch.float64) for x in (self.clock, self.expected_clock)
        )
        torch.testing.assert_close(prints, expected_prints, rtol=1e-9, atol=1e-9)
        return told


def at(time: float) -> Tensor:
    return torch.tensor([time])


@pytest.mark.parametrize(
    ("dense", "refresh_every"), [(NONE_DENSE, 0), (DenseSteps(1, 0.3), 2), (DenseSteps(0.25, 1), 0)], ids=str
)
def test_generations_of_two_streams(dense: DenseSteps, refresh_every: int) -> None:
    pair = Pair(3, dense, refresh_every)
    seen = []
    for seed in (0, 1):
        start, drift = (noise(seed + i, 2, 16, 5, 30, 52).bfloat16() for i in (0, 10))
        for step in range(6):
            for text in (7, 8):
                x = start + 0.1 * step * drift
                now = pair.call([x], at(1000.0 - 150 * step), noise(text, 1, 512, 4096).bfloat16(), 7.5, step // 3)
                seen.append((int(now[NOW_GENERATION]), int(now[NOW_STEP])))
    assert seen == [(seed + 1, step) for seed in (0, 1) for step in range(6) for _ in (7, 8)]


KINDS: dict[str, Any] = {
    "float64": noise(0, 3, 70).double(),
    "int64": torch.arange(-50, 5000),
    "bool": noise(1, 3, 70) > 0,
    "complex": torch.complex(noise(2, 9, 9), noise(3, 9, 9)).conj(),
    "negated": torch.complex(noise(2, 9, 9), noise(3, 9, 9)).conj().imag,
    "8 bits": noise(4, 64, 9).to(torch.float8_e4m3fn),
    "strided": noise(5, 64, 90)[:, ::3].mT,
    "strange": torch.tensor([math.inf, -math.inf, math.nan, 1e30, -0.0, 3e38]),
    "empty": torch.zeros(0),
    "number": 3,
    "many": noise(6, 18_000_000) > 0,  # positions of more than two digits
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_conditions(kind: str) -> None:
    pair = Pair(2)
    x, given = noise(0, 1, 16, 20, 20), KINDS[kind]
    for step in range(3):
        slots = [int(pair.call([x * (1 - 0.1 * step)], at(900.0 - step), y, 0)[NOW_SLOT]) for y in (given, 5)]
        assert slots == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entries", [1, 2, 33])
def test_entries_and_dtypes_of_latents(dtype: torch.dtype, entries: int) -> None:
    pair = Pair()
    x, y = noise(0, entries, 300).to(dtype), noise(1, 7).to(dtype)
    for step in range(3):
        assert int(pair.call([x * (1 - step / 8), y * (1 - step / 8)], at(900.0 - step), 0)[NOW_STEP]) == step
    x[-1] = noise(2, 300).to(dtype)
    assert int(pair.call([x, y * 0.5], at(800.0), 0)[NOW_GENERATION]) == 2


def test_timesteps_of_tokens() -> None:
    pair = Pair()
    for size, dtype in ((1500, torch.float32), (70_000, torch.bfloat16), (3, torch.int64)):
        pair.call([noise(9, 100)], at(0.0), 0)  # another generation
        for step in range(3):
            t = torch.zeros(2, size).to(dtype)
            t[1, size // 2 :] = 800 - 64 * step
            assert int(pair.call([noise(0, 2, 64) * (1 - 0.1 * step)], t, 0)[NOW_STEP]) == step


def test_calls_at_random() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    for trial in range(40):
        pair = Pair(1, draw(NONE_DENSE, DenseSteps(2, 1), DenseSteps(0.1, 0.2)), draw(0, 0, 2))
        x = first = noise(trial, 1, 128)
        t = begin = draw(1000.0, 1.0, 0.0, -3.0)
        for number in range(10):
            x, t = (
                x + draw(0.0, 0.01, 0.1, 0.6, 3.0) * noise(100 + number, 1, 128),
                t + draw(-100.0, -1.0, 0.0, 0.1, 100.0),
            )
            if draw(True, *[False] * 6):
                x, t = first, begin
            pair.call([x], at(t), noise(200 + draw(0, 1, 2, 3, 4), 6))


def given_to_op() -> tuple[Any, ...]:
    clock = torch.zeros(clock_words(STREAMS, 1), dtype=torch.int32, device=DEVICE)
    return clock, [noise(0, 1, 500).to(DEVICE)], at(900.0).to(DEVICE), [noise(1, 8, 9).to(DEVICE)]


def test_the_op_is_what_it_says() -> None:
    rules = (STREAMS, 0.0, 0.0, True, True, 0)
    torch.library.opcheck(torch.ops.lite_compile.advance_clock.default, (*given_to_op(), *rules))


def steps() -> Iterator[tuple[Tensor, Tensor]]:
    x = noise(0, 1, 500).to(DEVICE)
    for step in range(4):
        yield x * (1 - 0.1 * step), at(900.0 - step).to(DEVICE)


def test_compiled_it_is_a_few_launches_and_the_clock_is_not_copied() -> None:
    clock, _, _, conditions = given_to_op()
    compiled = torch.compile(
        lambda clock, x, t, text: advance(clock, x, t, [text], STREAMS) + 0, fullgraph=True, backend="inductor"
    )
    for number, (x, t) in enumerate(steps()):
        assert int(compiled(clock, x, t, *conditions)[NOW_STEP]) == number
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        compiled(clock, x, t, *conditions)
        torch.cuda.synchronize()
    launched = [event.key for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = {name.split("_fused")[0] for name in launched}
    assert {"compare_latents", "project", "decide"} <= names
    assert len(launched) <= 4, launched  # and the addition


def test_nothing_synchronises() -> None:
    clock, _, _, conditions = given_to_op()
    given = list(steps())
    for x, t in given:
        advance(clock, x, t, conditions, STREAMS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, t in given:
            advance(clock, x, t, conditions, STREAMS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
