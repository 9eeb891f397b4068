"""The clock outside of graphs, and what is handed to the kernels that advance it on GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import DEVICE, noise
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lite_compile.advance_clock import MAX_NUMBERS, ClockAdvance, ClockRules
from lite_compile.clock import advance, clock_words, identify
from lite_compile.clock_op import LOADED, _readable
from lite_compile.ops import NOW_GENERATION, NOW_SLOT, NOW_STEP, NOW_WORDS

Call = tuple[list[Tensor], Tensor | float, list[Tensor | float]]
STREAMS, CONDITIONS = 3, 3


def calls() -> Iterator[Call]:
    """Two generations of five steps with two prompts each, one of them with a number for a timestep."""
    texts = [torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (16, 17)]
    for seed in (0, 1):
        start, drift = (noise(10 * seed + i) for i in (2, 3))
        for step in range(5):
            latents = [start + 0.05 * step * drift]
            for text in texts:
                time = 1000.0 - 100 * step
                yield latents, time if seed else torch.tensor([time], device=DEVICE), [text, 7.5, True]


def run(given: Iterator[Call]) -> Tensor:
    """What each call was told."""
    advance = ClockAdvance(ClockRules(STREAMS, DEVICE))
    clock = torch.zeros(clock_words(STREAMS, CONDITIONS), dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        return torch.stack([advance(clock, *call).clone() for call in given])


def test_numbers_for_timestep_and_conditions() -> None:
    told = run(calls())
    assert told[:, NOW_GENERATION].tolist() == [1] * 10 + [2] * 10
    assert told[:, NOW_STEP].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] * 2
    assert told[:, NOW_SLOT].tolist() == [0, 1] * 10


def test_more_numbers_than_are_kept() -> None:
    steps = 2 * MAX_NUMBERS
    x = noise(0)
    told = run(([x * (1 - i / 256)], 1000.0 - i, [7.5, i // 2, 0]) for i in range(steps))
    assert told[:, NOW_STEP].tolist() == list(range(steps))


VALUES = torch.randn(1, 5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
CONJUGATED = VALUES.conj()
VIEWS = pytest.mark.parametrize(
    ("first", "view"), [(VALUES, CONJUGATED), (-CONJUGATED.imag, CONJUGATED.imag)], ids=["conj", "neg"]
)


@VIEWS
def test_conditions_that_are_to_be_negated_when_read(first: Tensor, view: Tensor) -> None:
    """Tensors whose memory holds something else than their elements."""
    assert view.is_conj() or view.is_neg()
    told = run(([noise(0) * (1 - 0.1 * i)], 900.0 - i, [x, 0, 0]) for i, x in enumerate((first, view, view.clone())))
    assert told[:, NOW_SLOT].tolist() == [0, 1, 1]


@VIEWS
def test_kernels_are_given_what_they_can_read(first: Tensor, view: Tensor) -> None:
    eight_bits = noise(0).to(torch.float8_e4m3fn)
    strided = noise(1).transpose(-1, -2)[..., ::2]
    for given in (first, view, eight_bits, strided, 7, 2.5, True):
        found = _readable(given, DEVICE)
        assert found.dtype in LOADED
        assert not found.is_neg()
        expected = torch.as_tensor(given, device=DEVICE)
        if expected.is_complex():
            found = torch.view_as_complex(found)
        assert torch.equal(found.flatten(), expected.to(found.dtype).flatten())


def test_conditions_whose_sizes_are_data() -> None:
    """Tracing for a GPU may not ask whether they are contiguous; on CPUs it never does."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes), torch.no_grad():
        words = shapes.create_unbacked_symint()
        texts = [torch.empty_strided((2, words, 8), strides, device="cuda") for strides in ((80, 8, 1), (9, 18, 1))]
        clock = torch.zeros(clock_words(STREAMS, 2), dtype=torch.int32, device="cuda")
        assert identify(texts, clock.device).shape == (16,)  # what `find_unreadable` asks
        now = advance(clock, torch.empty(1, 4, 8, device="cuda"), torch.empty(1, device="cuda"), texts, STREAMS)
    assert now.shape == (NOW_WORDS,)
