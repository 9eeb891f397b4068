"""`attend_triton` with the criterion "mass" in Triton's interpreter: as the reference, and within the budget.

Run by `test_interpreter.py`, as `attend_cases.py` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from attend_cases import TILE, make_now, make_qkv, padding_bias
from mass_bound import check_bound, draw_case, summarise
from torch import Tensor

from lite_compile.kernels.attend_triton import attend_triton
from lite_compile.ops import attend_reference
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits


def run(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, calls: int = 3, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), tile: TileShape = TILE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel and float64 reference side by side, their states compared after each call; the marks, the last output."""
    shape = state_shape(1, q.shape[0], q.shape[1], q.shape[2], k.shape[2], tile)
    state = torch.zeros(shape, dtype=torch.int32)
    expected, limit, now, scale = state.clone(), torch.tensor(threshold), make_now(), q.shape[-1] ** -0.5
    exact = [x.double() for x in (q, k, v)]
    for _ in range(calls):
        out = torch.full_like(q, math.nan)
        attend_triton(q, k, v, state, now, scale, limit, tile, out, None, key_bias, protected, criterion="mass")
        reference, _ = attend_reference(
            *exact, expected, now, scale, limit, tile, key_bias, protected, criterion="mass"
        )
        assert torch.equal(state, expected)
        assert (out.double() - reference).abs().max() < (1e-5 if q.dtype == torch.float32 else 5e-3)
    k_tiles = tile_count(k.shape[2], tile.k)
    return unpack_bits(state[0, ..., row_layout(k_tiles).mask_start :], k_tiles), out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(2, 2, 130), (4, 1, 500)])
def test_states_follow_the_reference(dtype: torch.dtype, heads: int, kv_heads: int, length: int) -> None:
    q, k, v = make_qkv(1, heads, 70, length, 40, dtype)
    marks, _ = run(q, k[:, :kv_heads], v[:, :kv_heads], -5.0)
    assert 0.1 < marks.float().mean() < 0.95


@pytest.mark.parametrize("kind", ["infinite", "lowest", "finite"])
def test_key_bias_and_protection_follow_the_reference(kind: str) -> None:
    q, k, v = make_qkv(2, 2, 70, 150, 32)
    marks, _ = run(q, k, v, -5.0, key_bias=padding_bias(kind, 2, 150), protected=(10, 20, 149, 150))
    assert marks[1, :, 1:, 5:9].all()
    assert not marks[..., [0, 1, 9]].any()
    assert not marks[:, :, 0].any()


def test_no_budget_skips_what_a_mask_hides_and_nothing_else() -> None:
    """Though weights of 2**-1000 underflow to 0."""
    q, k, v = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 96, 16), torch.randn(1, 1, 96, 16)
    q[..., 0], k[0, 0, 32:64, 0] = 4.0, -1000.0 / 1.4426950408889634
    bias = torch.zeros(1, 96)
    bias[0, 64:80] = -math.inf
    marks, _ = run(q, k, v, -math.inf, key_bias=bias)
    assert marks.flatten().tolist() == [False] * 4 + [True, False]
    marks, _ = run(q, k, v, -100.0, key_bias=bias)
    assert marks.flatten().tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("threshold", [math.nan, 0.5, math.inf])
def test_a_threshold_that_is_positive_or_nan_marks_nothing(threshold: float) -> None:
    marks, _ = run(*make_qkv(2, 2, 50, 96, 32), threshold, key_bias=padding_bias("infinite", 2, 96))
    assert not marks.any()


def test_the_only_tile_stays() -> None:
    marks, _ = run(*make_qkv(1, 1, 20, 16, 16), 0.0)
    assert not marks.any()


def test_rows_without_keys_mark_nothing() -> None:
    bias = torch.zeros(2, 96)
    bias[1] = -math.inf
    marks, out = run(*make_qkv(2, 1, 50, 96, 32), -1.0, key_bias=bias)
    assert not marks[1].any()
    assert not out[1].any()


def test_nan_never_marks() -> None:
    q, k, v = make_qkv(1, 1, 32, 96, 32)
    q[0, 0, 3] = math.nan
    state = torch.zeros(state_shape(1, 1, 1, 32, 96, TILE), dtype=torch.int32)
    attend_triton(q, k, v, state, make_now(), 0.2, torch.tensor(0.0), TILE, torch.empty_like(q), criterion="mass")
    assert not unpack_bits(state[..., row_layout(6).mask_start :], 6).any()


def bounded(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor, tile: TileShape,
    key_bias: Tensor | None, protected: Sequence[int],
) -> None:  # fmt: skip
    out = torch.empty_like(q)
    attend_triton(q, k, v, state, now, scale, threshold, tile, out, None, key_bias, protected, criterion="mass")


def test_what_is_marked_stays_within_the_budget() -> None:
    tiles = [TileShape(32, 16), TileShape(256, 16)]
    cases = [draw_case(seed, tiles, [torch.float32, torch.float16]) for seed in range(16)]
    seen = summarise([check_bound(bounded, case) for case in cases])
    assert seen.rows >= 10_000
    assert seen.marked >= seen.rows / 4
    assert seen.tightest > 0.95
    assert seen.spent > 0.2
