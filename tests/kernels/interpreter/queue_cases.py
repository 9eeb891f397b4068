"""What runs before the kernel for Hopper, in Triton's interpreter: order of programs, tile flags, 8-bit operands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_compile.kernels.quantize_qk import QK_DTYPES, quantize
from lite_compile.kernels.visit_lists import flag_biased, queue_programs


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 19), st.sampled_from([1, 5, 63, 64, 65, 140]), st.integers(1, 40), st.integers(0, 2**31))
def test_every_program_comes_once_the_longest_first(heads: int, q_tiles: int, most: int, seed: int) -> None:
    counts = torch.randint(0, most, (heads, q_tiles), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    queue = torch.full((heads, q_tiles), -1, dtype=torch.int64)
    queue_programs[(heads,)](counts, queue, q_tiles)
    programs, lengths = queue >> 32, queue & (2**32 - 1)
    assert torch.equal(programs.flatten().sort().values, torch.arange(heads * q_tiles))
    assert torch.equal(lengths, counts.flatten()[programs])
    assert bool((lengths.diff(dim=1) <= 0).all())
    head = programs // q_tiles
    assert torch.equal(head, head[:, :1].expand_as(head)), "programs of one head stay together"
    assert bool((counts.sum(1)[head[:, 0]].diff() <= 0).all())
    equal = lengths.diff(dim=1) == 0
    assert bool((programs.diff(dim=1)[equal] > 0).all()), "in their order where they are as long"


def test_tiles_with_a_bias_are_flagged() -> None:
    bias = torch.zeros(2, 70)
    bias[0, 31], bias[1, 69], bias[1, 0] = -torch.inf, 1e-30, float("nan")
    flags = torch.full((2, 5), 7, dtype=torch.int8)
    flag_biased[5, 2](bias, flags, 70, TILE_K=16)
    assert flags.tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]]


@pytest.mark.parametrize("name", ["int8"])  # the interpreter knows no fp8
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 37, 24), (1, 1, 16, 64)])
def test_what_is_rounded_to_8_bits_is_near(name: str, center: bool, shape: tuple[int, ...]) -> None:
    batch, heads, length, dim = shape
    x = torch.randn(batch, length, heads, dim, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    x = x + 5 * torch.arange(dim)
    x[0, 0, :16] = 0
    columns = 64
    quantized, scales = quantize(x, name, 16, columns, center)
    assert quantized.shape == (batch, heads, length, columns)
    assert quantized.dtype == QK_DTYPES[name][0]
    assert not quantized[..., dim:].any()
    steps = scales.repeat_interleave(16, 2)[:, :, :length, None]
    expected = x - x.mean(2, keepdim=True) if center else x
    assert bool(((quantized[..., :dim] * steps - expected).abs() <= 0.51 * steps + 1e-5).all())


def test_not_a_number_stays_in_its_block() -> None:
    x = torch.ones(1, 1, 48, 64)
    x[0, 0, 20, 3] = float("nan")
    assert quantize(x, "int8", 16, 64, center=False)[1].isnan().tolist() == [[[False, True, False]]]
