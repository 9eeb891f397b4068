"""`attend_cpu` with the criterion "mass": its states agree with the reference's word for word."""

from __future__ import annotations

import math

import pytest
import torch
from test_attend_cpu import (
    BIASES,
    DTYPES,
    SMALL,
    call,
    clustered,
    follow_reference,
    fresh_state,
    now_at,
    padding_bias,
    skipped_bits,
)
from torch import Tensor

from lite_compile.ops import LOG2_E, attend_reference, touched_tiles
from lite_compile.skip_state import TileShape


def marks(state: Tensor, k_len: int) -> Tensor:
    """bool `[B, H, q_tiles, k_tiles]`."""
    return skipped_bits(state, k_len, SMALL)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [-12.3, -4.3])
@pytest.mark.parametrize("dim", [16, 64])
def test_matches_reference_over_calls(dim: int, threshold: float, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in clustered(2, 2, 200, 333, dim))
    state = follow_reference(q, k[:, :1], v[:, :1], 8 / dim, threshold, SMALL, calls=4, criterion="mass")
    assert marks(state, 333).float().mean() > 0.05


@pytest.mark.parametrize("kind", [kind for kind in BIASES if kind != "finite"])
def test_key_bias_and_protection_follow_the_reference(kind: str) -> None:
    q, k, v = clustered(2, 2, 100, 150, 16)
    bias, protected = padding_bias(kind, 2, 150), (0, 20)
    state = follow_reference(q, k, v, 0.5, -4.3, SMALL, key_bias=bias, protected=protected, criterion="mass")
    marked = marks(state, 150)
    assert marked.any()
    assert not marked[:, :, touched_tiles(4, SMALL.q, protected)].any()
    assert not marked[..., touched_tiles(10, SMALL.k, protected)].any()


def test_underflow_marks_later_rather_than_more() -> None:
    """Weights are relative to the maximum of all tiles here, to that of the tiles so far in the reference."""
    q, k, v = clustered(2, 2, 100, 150, 16)
    bias, limit = padding_bias("finite", 2, 150), torch.tensor(-4.3)
    state = fresh_state(q, k, SMALL)
    expected, exact = state.clone(), [x.double() for x in (q, k, v)]
    seen = []
    for _ in range(3):
        call(q, k, v, state, now_at(), 0.5, -4.3, SMALL, key_bias=bias, criterion="mass")
        attend_reference(*exact, expected, now_at(), 0.5, limit, SMALL, bias, criterion="mass")
        assert not (marks(state, 150) & ~marks(expected, 150)).any()
        seen.append(torch.equal(state, expected))
    assert seen == [False, False, True]


def test_many_light_tiles_are_not_marked_where_max_marks_them_all() -> None:
    """Each key is 2**-6 of the heaviest: nothing by itself, all of them together most of the row."""
    q, k, v = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 1024, 16), torch.randn(1, 1, 1024, 16)
    q[..., 0], k[0, 0, 16:, 0] = 4.0, -6.0 / LOG2_E
    found = {}
    for criterion in ("max", "mass"):
        state = fresh_state(q, k, SMALL)
        call(q, k, v, state, now_at(), 0.25, -6.0, SMALL, criterion=criterion)
        found[criterion] = int(marks(state, 1024).sum())
    assert found == {"max": 63, "mass": 0}


def test_what_a_tile_may_weigh() -> None:
    """Tiles of equal weights but one, whose share is just within or just beyond `2 ** threshold / k_tiles`."""
    q, k, v = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 64, 16), torch.randn(1, 1, 64, 16)
    q[..., 0], k[0, 0, 48:, 0] = 4.0, -5.0 / LOG2_E
    exact = math.log2(2.0**-5 / (3 + 2.0**-5) * 4)
    for threshold, expected in ((exact - 1e-3, False), (exact + 1e-3, True)):
        state = fresh_state(q, k, SMALL)
        call(q, k, v, state, now_at(), 0.25, threshold, SMALL, criterion="mass")
        assert marks(state, 64).flatten().tolist() == [False, False, False, expected]


def test_no_budget_skips_what_a_mask_hides_and_nothing_else() -> None:
    """Though weights of 2**-1000 underflow to 0."""
    q, k, v = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 96, 16), torch.randn(1, 1, 96, 16)
    q[..., 0], k[0, 0, 32:64, 0] = 4.0, -1000.0 / LOG2_E
    bias = torch.zeros(1, 96)
    bias[0, 64:80] = -math.inf
    for threshold, expected in ((-math.inf, [0, 0, 0, 0, 1, 0]), (-100.0, [0, 0, 1, 1, 1, 0])):
        state = follow_reference(q, k, v, 0.25, threshold, SMALL, key_bias=bias, criterion="mass")
        assert marks(state, 96).flatten().tolist() == list(map(bool, expected))


@pytest.mark.parametrize("threshold", [math.nan, 0.5, math.inf])
def test_a_threshold_that_is_positive_or_nan_marks_nothing(threshold: float) -> None:
    q, k, v = clustered(2, 2, 100, 150, 16)
    bias = padding_bias("left", 2, 150)
    state = follow_reference(q, k, v, 0.5, threshold, SMALL, key_bias=bias, criterion="mass")
    assert not marks(state, 150).any()


def test_the_only_tile_stays() -> None:
    q, k, v = clustered(1, 1, 40, 16, 16)
    assert not marks(follow_reference(q, k, v, 0.25, 0.0, SMALL, criterion="mass"), 16).any()


@pytest.mark.parametrize("place", ["query", "key"])
def test_nan_never_marks(place: str) -> None:
    q, k, v = clustered(1, 1, 64, 128, 16)
    (q if place == "query" else k)[0, 0, 40] = math.nan
    state = fresh_state(q, k, SMALL)
    call(q, k, v, state, now_at(), 0.5, 0.0, SMALL, criterion="mass")
    found = marks(state, 128)[0, 0]
    assert not found[1].any()
    assert found[0].any() == (place == "query")


def test_rows_without_keys_mark_nothing() -> None:
    q, k, v = clustered(2, 1, 60, 90, 16)
    bias = torch.zeros(2, 90)
    bias[1] = -math.inf
    state = follow_reference(q, k, v, 0.5, -2.0, SMALL, key_bias=bias, criterion="mass")
    assert not marks(state, 90)[1].any()
    assert marks(state, 90)[0].any()


def test_nothing_is_weighed_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by the criterion "max", which has to cost nothing more."""
    q, k, v = clustered(1, 2, 64, 128, 16)
    sums = []
    plain = torch.sum
    monkeypatch.setattr(torch, "sum", lambda *given, **named: sums.append(0) or plain(*given, **named))
    for criterion, slot, expected in (("max", 0, 0), ("mass", -1, 0), ("mass", 0, 1)):
        sums.clear()
        call(q, k, v, fresh_state(q, k, SMALL), now_at(slot=slot), 0.5, -4.0, SMALL, criterion=criterion)
        assert bool(sums) == bool(expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    q, k, v = clustered(2, 3, 640, 512, 64)
    tile, threads, states = TileShape(128, 64), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state = fresh_state(q, k, tile)
            for _ in range(3):
                call(q, k, v, state, now_at(), 0.125, -4.0, tile, criterion="mass")
            states.append(state)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(state, states[0]) for state in states)
    assert skipped_bits(states[0], 512, tile).any()
