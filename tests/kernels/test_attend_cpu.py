"""`attend_cpu` against `attend_reference` in float64 and against what torch SDPA loses in the same dtype.

Wherever states are compared, q and k are small integers and the scale is a power of two: scores are exact in every
dtype, thresholds lie between two possible scores, and so the states must agree word for word, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite_compile.kernels.attend_cpu import CPU_TILE, attend_cpu
from lite_compile.ops import COMPUTED_TILE, FREE_TILE, HIDDEN_TILE, LOG2_E, attend_reference, touched_tiles
from lite_compile.skip_state import (
    COMPUTED_WORD,
    EPOCH_WORD,
    TileShape,
    pack_bits,
    row_layout,
    state_shape,
    tile_count,
    unpack_bits,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = TileShape(32, 16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny GEMMs on two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def now_at(epoch: int = 1, slot: int = 0) -> Tensor:
    return torch.tensor([epoch, 0, slot, 0, 0], dtype=torch.int32)


def fresh_state(q: Tensor, k: Tensor, tile: TileShape, streams: int = 1) -> Tensor:
    batch, heads, q_len, _ = q.shape
    return torch.zeros(state_shape(streams, batch, heads, q_len, k.shape[2], tile), dtype=torch.int32)


def skipped_bits(state: Tensor, k_len: int, tile: TileShape) -> Tensor:
    """bool `[streams, B, H, q_tiles, k_tiles]`."""
    k_tiles = tile_count(k_len, tile.k)
    return unpack_bits(state[..., row_layout(k_tiles).mask_start :], k_tiles)


def heads_last(x: Tensor) -> Tensor:
    """The same values and shape, laid out as `[B, S, H, D]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def clustered(batch: int, heads: int, q_len: int, k_len: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Integer q and k whose rows score high with the keys of a few clusters only; v is normal."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    centres = 4 * integers(0, 1, batch, heads, 6, dim) - 2
    q_cluster, k_cluster = torch.arange(q_len) * 6 // q_len, torch.arange(k_len) * 6 // k_len
    q = centres[:, :, q_cluster] + integers(-1, 1, batch, heads, q_len, dim)
    k = centres[:, :, (k_cluster * 5 + 1) % 6] + integers(-1, 1, batch, heads, k_len, dim)
    return q, k, torch.randn(batch, heads, k_len, dim, generator=generator)


def exact_scale(dim: int) -> float:
    return 2.0 ** -round(math.log2(dim) / 2)


def threshold_between(scores: int, scale: float) -> float:
    """Log2 units, half-way between `scores` and `scores + 1` integer scores."""
    return -(scores + 0.5) * abs(scale) * LOG2_E


def call(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: float, tile: TileShape,
    poison: Callable[[Tensor], Tensor] = heads_last, key_bias: Tensor | None = None, protected: Sequence[int] = (),
    criterion: str = "max", kinds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = poison(torch.full((*q.shape[:3], v.shape[-1]), math.nan, dtype=q.dtype))
    lse = torch.full(q.shape[:3], math.nan)
    limit = torch.tensor(threshold)
    attend_cpu(q, k, v, state, now, scale, limit, tile, out, lse, key_bias, protected, criterion, kinds)
    return out, lse


def sdpa_error(
    q: Tensor, k: Tensor, v: Tensor, scale: float, expected: Tensor, skipped: Tensor, tile: TileShape,
    key_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What torch SDPA in the dtype of `q` loses on the tiles kept by `skipped` (bool `[B, H, q_tiles, k_tiles]`)."""
    mask = ~skipped.repeat_interleave(tile.q, 2).repeat_interleave(tile.k, 3)[:, :, : q.shape[2], : k.shape[2]]
    if key_bias is not None:
        mask = torch.where(mask, key_bias[:, None, None], -math.inf).to(q.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.double() - expected


def assert_close(out: Tensor, expected: Tensor, sdpa_lost: Tensor) -> None:
    """Error at most twice that of SDPA, in norm and at the worst element, give or take four roundings of the sums."""
    lost = out.double() - expected
    eps = torch.finfo(torch.float64 if out.dtype == torch.float64 else torch.float32).eps
    assert lost.norm() <= 2 * sdpa_lost.norm() + 4 * eps * expected.norm()
    assert lost.abs().max() <= 2 * sdpa_lost.abs().max() + 4 * eps * expected.abs().max()


def follow_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, threshold: float, tile: TileShape, calls: int = 3,
    key_bias: Tensor | None = None, protected: Sequence[int] = (), criterion: str = "max", kinds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run `calls` calls beside the float64 reference; returns the final state after checking every one of them."""
    state, now = fresh_state(q, k, tile), now_at()
    reference_state = state.clone()
    for _ in range(calls):
        skipped = skipped_bits(state, k.shape[2], tile)[0]
        given = {"key_bias": key_bias, "protected": protected, "criterion": criterion, "kinds": kinds}
        out, lse = call(q, k, v, state, now, scale, threshold, tile, **given)  # type: ignore[arg-type]
        expected, expected_lse = attend_reference(
            *(x.double() for x in (q, k, v)),
            reference_state,
            now,
            scale,
            torch.tensor(threshold),
            tile,
            key_bias,
            protected,
            criterion,
            kinds,
        )
        assert torch.equal(state, reference_state)
        assert_close(out, expected, sdpa_error(q, k, v, scale, expected, skipped, tile, key_bias))
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 128])
def test_matches_reference_over_calls(dim: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in clustered(1, 2, 200, 333, dim))
    tile = TileShape(32, 24)
    state = follow_reference(q, k, v, exact_scale(dim), threshold_between(dim, exact_scale(dim)), tile, calls=4)
    assert 0.3 < skipped_bits(state, 333, tile).float().mean() < 0.95


def test_anchors_that_name_groups_of_tiles() -> None:
    q, k, v = clustered(1, 1, 20, 600, 16)
    tile = TileShape(16, 4)
    assert row_layout(tile_count(600, tile.k)).anchor_group > 1
    follow_reference(q, k, v, 0.25, threshold_between(10, 0.25), tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_strided_inputs(dtype: torch.dtype) -> None:
    q, k, v = (heads_last(x.to(dtype)) for x in clustered(2, 3, 300, 300, 64))
    follow_reference(q, k, v, 0.125, threshold_between(60, 0.125), TileShape(128, 64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("slot", "threads"), [(-1, 1), (0, 2)])
@pytest.mark.parametrize("shape", [(512, 512), (509, 700), (1, 5)], ids=str)
def test_dense_is_as_accurate_as_sdpa(dtype: torch.dtype, slot: int, threads: int, shape: tuple[int, int]) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    q = torch.randn(1, 4, shape[0], 64).to(dtype)
    k, v = (torch.randn(1, 4, shape[1], 64).to(dtype) for _ in range(2))
    tile = CPU_TILE
    out, lse = call(q, k, v, fresh_state(q, k, tile), now_at(slot=slot), 0.125, -10.0, tile)
    scores = q.double() @ k.double().mT * 0.125
    expected = torch.softmax(scores, -1) @ v.double()
    nothing = torch.zeros(1, 4, tile_count(shape[0], tile.q), tile_count(shape[1], tile.k), dtype=torch.bool)
    assert_close(out, expected, sdpa_error(q, k, v, 0.125, expected, nothing, tile))
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-6, atol=1e-6)


def test_slot_minus_one_neither_uses_nor_records() -> None:
    q, k, v = clustered(1, 2, 128, 128, 16)
    state = fresh_state(q, k, SMALL)
    threshold = threshold_between(10, 0.25)
    dense, _ = call(q, k, v, state, now_at(slot=-1), 0.25, threshold, SMALL)
    assert not state.any()
    for _ in range(3):
        call(q, k, v, state, now_at(), 0.25, threshold, SMALL)
    before = state.clone()
    assert skipped_bits(state, 128, SMALL).any()
    again, _ = call(q, k, v, state, now_at(slot=-1), 0.25, threshold, SMALL)
    assert torch.equal(state, before)
    assert torch.equal(dense, again)


def test_streams_are_separate() -> None:
    q, k, v = clustered(1, 2, 128, 128, 16)
    threshold = threshold_between(10, 0.25)
    state, alone = fresh_state(q, k, SMALL, streams=2), fresh_state(q, k, SMALL)
    for _ in range(3):
        out, _ = call(q, k, v, state, now_at(slot=1), 0.25, threshold, SMALL)
        expected, _ = call(q, k, v, alone, now_at(), 0.25, threshold, SMALL)
        assert torch.equal(out, expected)
    assert not state[0].any()
    assert torch.equal(state[1], alone[0])


@pytest.mark.parametrize("threshold", [math.nan, 0.5, math.inf])
def test_a_threshold_that_is_positive_or_nan_marks_nothing(threshold: float) -> None:
    """Whatever a call finds on the device; what was marked before stays so."""
    q, k, v = clustered(1, 2, 150, 150, 16)
    follow_reference(q, k, v, 0.25, threshold, SMALL)
    state = fresh_state(q, k, SMALL)
    call(q, k, v, state, now_at(), 0.25, threshold, SMALL)
    assert not skipped_bits(state, 150, SMALL).any()
    call(q, k, v, state, now_at(), 0.25, threshold_between(10, 0.25), SMALL)
    marked = skipped_bits(state, 150, SMALL)
    assert marked.any()
    call(q, k, v, state, now_at(), 0.25, threshold, SMALL)
    assert torch.equal(skipped_bits(state, 150, SMALL), marked)


def test_stale_generation_reads_as_empty() -> None:
    q, k, v = clustered(1, 2, 128, 128, 16)
    threshold = threshold_between(10, 0.25)
    used, new = fresh_state(q, k, SMALL), fresh_state(q, k, SMALL)
    for _ in range(3):
        call(q, k, v, used, now_at(1), 0.25, threshold, SMALL)
    out, _ = call(q, k, v, used, now_at(2), 0.25, threshold, SMALL)
    expected, _ = call(q, k, v, new, now_at(2), 0.25, threshold, SMALL)
    assert torch.equal(out, expected)
    assert torch.equal(used, new)
    assert (used[..., EPOCH_WORD] == 2).all()
    assert (used[..., COMPUTED_WORD] == tile_count(128, SMALL.k)).all()


def test_threshold_of_minus_infinity_never_marks() -> None:
    q, k, v = clustered(1, 2, 128, 128, 16)
    state = follow_reference(q, k, v, 0.25, -math.inf, SMALL)
    assert not skipped_bits(state, 128, SMALL).any()


@pytest.mark.parametrize("place", ["first row", "some rows", "key"])
def test_nan_stays_in_its_row_and_never_marks(place: str) -> None:
    q, k, v = clustered(1, 1, 120, 128, 16)
    if place == "key":
        k[0, 0, 40] = math.nan
    else:
        q[0, 0, [0] if place == "first row" else [5, 37, 119]] = math.nan
    threshold, state = threshold_between(10, 0.25), fresh_state(q, k, SMALL)
    reference_state = state.clone()
    for _ in range(3):
        out, lse = call(q, k, v, state, now_at(), 0.25, threshold, SMALL)
        expected, _ = attend_reference(
            q.double(), k.double(), v.double(), reference_state, now_at(), 0.25, torch.tensor(threshold), SMALL
        )
        assert torch.equal(state, reference_state)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(lse.isnan(), expected.isnan().any(-1))


def test_scores_of_minus_infinity_leave_no_row_without_a_tile() -> None:
    torch.manual_seed(0)
    q, k, v = torch.rand(1, 1, 128, 16) + 1, torch.full((1, 1, 256, 16), -math.inf), torch.randn(1, 1, 256, 16)
    state = fresh_state(q, k, CPU_TILE)
    expected = state.clone()
    call(q, k, v, state, now_at(), 0.25, -1.0, CPU_TILE)
    attend_reference(q.double(), k.double(), v.double(), expected, now_at(), 0.25, torch.tensor(-1.0), CPU_TILE)
    assert not skipped_bits(state, 256, CPU_TILE).all(-1).any()
    assert torch.equal(skipped_bits(state, 256, CPU_TILE), skipped_bits(expected, 256, CPU_TILE))


def test_imposed_empty_rows_are_zero() -> None:
    q, k, v = clustered(1, 2, 64, 64, 16)
    state = fresh_state(q, k, SMALL)
    layout = row_layout(4)
    state[..., EPOCH_WORD] = 1
    every_tile = pack_bits(torch.ones(4, dtype=torch.bool), layout.mask_words)
    state[0, 0, 0, 0, layout.mask_start :] = every_tile
    state[0, 0, 1, :, layout.mask_start :] = every_tile
    expected_state = state.clone()
    out, lse = call(q, k, v, state, now_at(), 0.25, -8.0, SMALL)
    doubles = [x.double() for x in (q, k, v)]
    expected, expected_lse = attend_reference(*doubles, expected_state, now_at(), 0.25, torch.tensor(-8.0), SMALL)
    empty = torch.tensor([[True, False], [True, True]]).repeat_interleave(32, 1)[None]
    for rows, logs in ((out, lse), (expected, expected_lse)):
        assert torch.equal(logs == -math.inf, empty)
        assert torch.equal((rows == 0).all(-1), empty)
    assert torch.equal(state, expected_state)


def test_rows_of_minus_infinity_are_zero_and_nan_stays_nan() -> None:
    q, k, v = clustered(1, 1, 40, 64, 16)
    q[0, 0, 3], q[0, 0, 35] = 0.0, math.nan
    q[0, 0, 3, 0] = -math.inf
    k[..., 0] = 1.0
    state = fresh_state(q, k, SMALL)
    out, lse = call(q, k, v, state, now_at(), 0.25, -8.0, SMALL)
    assert not out[0, 0, 3].any()
    assert lse[0, 0, 3] == -math.inf
    assert out[0, 0, 35].isnan().all()
    assert torch.isfinite(out[0, 0, [*range(3), *range(4, 35)]]).all()


@pytest.mark.parametrize("slot", [-1, 1, 7])
def test_a_slot_that_the_state_lacks_uses_none(slot: int) -> None:
    q, k, v = clustered(1, 2, 64, 64, 16)
    state = fresh_state(q, k, SMALL)
    call(q, k, v, state, now_at(), 0.25, -1.0, SMALL)
    before = state.clone()
    assert skipped_bits(state, 64, SMALL).any()
    dense, _ = call(q, k, v, fresh_state(q, k, SMALL), now_at(), 0.25, -1.0, SMALL)
    out, _ = call(q, k, v, state, now_at(slot=slot), 0.25, -1.0, SMALL)
    assert torch.equal(out, dense)
    assert torch.equal(state, before)


def padding_bias(kind: str, batch: int, k_len: int) -> Tensor:
    """float32 `[batch, k_len]`; integers apart from what removes keys, so that scores stay exact."""
    generator = torch.Generator().manual_seed(5)
    bias = torch.randint(-3, 4, (batch, k_len), generator=generator).float()
    if kind == "ragged":
        bias[-1, k_len // 4 :] = -math.inf
    elif kind == "whole tiles":
        bias[:, k_len // 4 : k_len // 2] = -math.inf
    elif kind == "left":
        bias[:, : k_len // 2] = -math.inf
    elif kind == "finite":
        bias[:, k_len // 4 :] = -10000
    elif kind == "lowest":
        bias[:, k_len // 4 :] = torch.finfo(torch.float32).min
    return bias


BIASES = ["small", "ragged", "whole tiles", "left", "finite", "lowest"]


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize(("batch", "bias_batch"), [(1, 1), (2, 1), (2, 2)])
def test_key_bias_follows_the_reference(kind: str, batch: int, bias_batch: int) -> None:
    q, k, v = clustered(batch, 2, 100, 150, 16)
    bias = padding_bias(kind, bias_batch, 150)
    state = follow_reference(q, k, v, 0.25, threshold_between(10, 0.25), SMALL, key_bias=bias)
    marked = skipped_bits(state, 150, SMALL)[0]
    assert marked.any()
    if kind != "small":
        assert marked[-1, ..., 3].all()  # keys 48 to 63 are removed from the last batch entry, or nearly


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_decision_is_about_biased_scores(dtype: torch.dtype) -> None:
    """Equal scores, and a bias that alone makes one tile negligible."""
    q, k, v = (torch.ones(1, 1, length, 16, dtype=dtype) for length in (32, 64, 64))
    state, bias = fresh_state(q, k, SMALL), torch.zeros(1, 64)
    bias[0, 16:32] = -8.0
    call(q, k, v, state, now_at(), 0.25, -8.0 * LOG2_E + 0.01, SMALL, key_bias=bias)
    assert skipped_bits(state, 64, SMALL).flatten().tolist() == [False, True, False, False]
    state.zero_()
    call(q, k, v, state, now_at(), 0.25, -8.0 * LOG2_E - 0.01, SMALL, key_bias=bias)
    assert not skipped_bits(state, 64, SMALL).any()


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_a_batch_entry_without_keys(lowest: float) -> None:
    """Minus infinity leaves nothing to attend to; what is finite leaves the mean of all, at every call."""
    q, k, v = clustered(2, 2, 60, 90, 16)
    bias = torch.zeros(2, 90)
    bias[1] = lowest
    state = fresh_state(q, k, SMALL)
    for _ in range(3):
        out, lse = call(q, k, v, state, now_at(), 0.25, -4.0, SMALL, key_bias=bias)
    if lowest == -math.inf:
        assert not out[1].any()
        assert (lse[1] == -math.inf).all()
    else:
        scores = q[1] @ k[1].mT * 0.25 + lowest  # float32 rounds the scores away
        torch.testing.assert_close(out[1], scores.softmax(-1) @ v[1])
    assert out[0].isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_heads_share_key_heads(kv_heads: int, dtype: torch.dtype) -> None:
    q, _, _ = clustered(2, 4, 100, 150, 16)
    _, k, v = clustered(2, kv_heads, 100, 150, 16)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    state = follow_reference(q, k, v, 0.25, threshold_between(10, 0.25), SMALL)
    repeated = [x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)]
    assert torch.equal(state, follow_reference(q, *repeated, 0.25, threshold_between(10, 0.25), SMALL))
    assert skipped_bits(state, 150, SMALL).any()


def kinds_of_tiles(numbers: Sequence[int], k_len: int, tile: TileShape) -> tuple[Tensor, Tensor]:
    """int8 kinds of the key tiles, and the bias that hides the keys of those that are hidden."""
    kinds = torch.tensor(numbers, dtype=torch.int8)
    hidden = (kinds == HIDDEN_TILE).repeat_interleave(tile.k)[:k_len]
    return kinds, torch.zeros(1, k_len).masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("protected", [(), (0, 20)], ids=str)
def test_kinds_of_key_tiles(protected: tuple[int, ...]) -> None:
    """1 is always computed, 2 never, also without a slot and where all else is protected."""
    q, k, v = clustered(1, 2, 150, 150, 16)
    kinds, bias = kinds_of_tiles([2, 0, 1, 2, 0, 0, 1, 0, 2, 2], 150, SMALL)
    threshold = threshold_between(10, 0.25)
    state = follow_reference(q, k, v, 0.25, threshold, SMALL, key_bias=bias, protected=protected, kinds=kinds)
    marked = skipped_bits(state, 150, SMALL)[..., kinds == COMPUTED_TILE]
    assert not marked.any()
    assert skipped_bits(state, 150, SMALL)[..., kinds == FREE_TILE].any()
    assert int(state[..., COMPUTED_WORD].max()) <= 6
    assert not protected or (state[0, :, :, 0, COMPUTED_WORD] == 6).all()
    shown = bias[0] == 0
    for slot in (-1, 0):
        out, lse = call(
            q, k, v, fresh_state(q, k, SMALL), now_at(slot=slot), 0.25, -8.0, SMALL, key_bias=bias, kinds=kinds
        )
        scores = q.double() @ k[:, :, shown].double().mT * 0.25
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ v[:, :, shown].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_computed_tiles_are_computed_though_the_state_marks_everything() -> None:
    q, k, v = clustered(1, 2, 150, 150, 16)
    state = fresh_state(q, k, SMALL)
    state[..., EPOCH_WORD] = 1
    state[..., row_layout(10).mask_start :] = -1
    kinds, _ = kinds_of_tiles([0, 0, 1, 0, 0, 0, 0, 0, 0, 1], 150, SMALL)
    out, _ = call(q, k, v, state, now_at(), 0.25, -8.0, SMALL, kinds=kinds)
    keys = [*range(32, 48), *range(144, 150)]
    expected = (q @ k[:, :, keys].mT * 0.25).softmax(-1) @ v[:, :, keys]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (state[..., COMPUTED_WORD] == 2).all()


@pytest.mark.parametrize("protected", [(0, 20), (130, 150), (5, 6, 40, 70), (0, 1, 32, 33, 70, 70, 140, 9999)], ids=str)
def test_protected_tiles_are_never_marked(protected: tuple[int, ...]) -> None:
    q, k, v = clustered(1, 2, 150, 150, 16)
    threshold = threshold_between(10, 0.25)
    state = follow_reference(q, k, v, 0.25, threshold, SMALL, protected=protected)
    rows, keys = touched_tiles(5, SMALL.q, protected), touched_tiles(10, SMALL.k, protected)
    marked = skipped_bits(state, 150, SMALL)[0]
    assert not marked[:, :, rows].any()
    assert not marked[..., keys].any()
    assert marked.any()
    elsewhere = skipped_bits(follow_reference(q, k, v, 0.25, threshold, SMALL), 150, SMALL)[0]
    assert elsewhere[:, :, rows].any()
    assert elsewhere[..., keys].any()


def test_protected_tiles_are_computed_though_the_state_marks_everything() -> None:
    q, k, v = clustered(1, 2, 150, 150, 16)
    state, layout, protected = fresh_state(q, k, SMALL), row_layout(10), (40, 50)
    state[..., EPOCH_WORD] = 1
    state[..., layout.mask_start :] = pack_bits(torch.ones(10, dtype=torch.bool), layout.mask_words)
    expected_state = state.clone()
    out, _ = call(q, k, v, state, now_at(), 0.25, -8.0, SMALL, protected=protected)
    exact = [x.double() for x in (q, k, v)]
    attend_reference(*exact, expected_state, now_at(), 0.25, torch.tensor(-8.0), SMALL, None, protected)
    assert torch.equal(state, expected_state)
    keys = slice(32, 64)  # the tiles of 16 keys that hold 40 to 49
    few = torch.softmax(q @ k[:, :, keys].mT * 0.25, -1) @ v[:, :, keys]
    dense = torch.softmax(q @ k.mT * 0.25, -1) @ v
    rows = slice(32, 64)
    torch.testing.assert_close(out[:, :, rows], dense[:, :, rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, :, :32], few[:, :, :32], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, :, 64:], few[:, :, 64:], rtol=1e-5, atol=1e-5)


def test_lse_is_optional_and_runs_repeat_bit_for_bit() -> None:
    q, k, v = (x.bfloat16() for x in clustered(1, 2, 256, 256, 64))
    tile = CPU_TILE
    outs = []
    for _ in range(2):
        state, out = fresh_state(q, k, tile), torch.full_like(q, math.nan)
        for _ in range(3):
            attend_cpu(q, k, v, state, now_at(), 0.125, torch.tensor(threshold_between(60, 0.125)), tile, out)
        outs.append((out, state))
    with_lse = fresh_state(q, k, tile)
    for _ in range(3):
        out, _ = call(q, k, v, with_lse, now_at(), 0.125, threshold_between(60, 0.125), tile)
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    assert torch.equal(outs[0][0], out)
    assert torch.equal(outs[0][1], with_lse)


@pytest.mark.parametrize("shape", [(1, 1, 100, 4096), (1, 1, 1000, 700), (2, 3, 640, 512)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int, int]) -> None:
    q, k, v = clustered(*shape, 64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = fresh_state(q, k, CPU_TILE)
        for _ in range(3):
            out, lse = call(q, k, v, state, now_at(), 0.125, threshold_between(60, 0.125), CPU_TILE)
        results.append((out, lse, state))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_tiles_with_different_counts_share_operators_only() -> None:
    """A query tile that keeps fewer key tiles than its neighbours sees nothing of those that it skips."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, 16) for length in (256, 250, 250))
    state, layout, k_tiles = fresh_state(q, k, SMALL), row_layout(16), 16
    counts = torch.tensor([16, 15, 14, 9, 8, 1, 0, 0])
    skipped = torch.rand(8, k_tiles).argsort(-1) >= counts[:, None]
    skipped[:6, 4], skipped[:6, 7] = False, True
    state[..., EPOCH_WORD] = 1
    state[..., layout.mask_start :] = pack_bits(skipped, layout.mask_words)
    v[0, 0, 7 * SMALL.k] = math.inf
    k[0, 0, 7 * SMALL.k + 1] = math.nan
    out, lse = call(q, k, v, state, now_at(), 0.25, -math.inf, SMALL)
    keep = ~skipped.repeat_interleave(SMALL.q, 0).repeat_interleave(SMALL.k, 1)[:192, :250]
    scores = (q[0, 0, :192].double() @ k[0, 0].double().mT * 0.25).masked_fill(~keep, -math.inf)
    expected = torch.softmax(scores, -1) @ v[0, 0].double().nan_to_num(posinf=0.0)
    torch.testing.assert_close(out[0, 0, :192].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[0, 0, :192].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-6)
    assert not out[0, 0, 192:].any()
    assert (state[0, 0, 0, :, COMPUTED_WORD] == (~skipped).sum(-1)).all()


def layout_ends(tiles: Tensor, k_tiles: int) -> Tensor:
    return (tiles == 0) | (tiles == k_tiles - 1)


def layout_scattered(tiles: Tensor, k_tiles: int) -> Tensor:
    return torch.isin(tiles, torch.randperm(k_tiles, generator=torch.Generator().manual_seed(3))[:4])


@pytest.mark.parametrize("layout", ["ends", "scattered", "band"])
def test_finds_what_an_oracle_finds(layout: str) -> None:
    torch.manual_seed(1)
    length, dim = 2048, 64
    tile = CPU_TILE
    k_tiles = length // tile.k
    tiles = torch.arange(length) // tile.k
    if layout == "band":
        angles = torch.arange(length)[:, None] * torch.rand(dim // 2) * 0.02
        k = 2 * torch.cat([angles.cos(), angles.sin()], -1).expand(1, 2, length, dim)
        q = k + 0.1 * torch.randn(1, 2, length, dim)
    else:
        direction = torch.randn(dim).sign()
        high = (layout_ends if layout == "ends" else layout_scattered)(tiles, k_tiles)
        q = 2 * direction + 0.5 * torch.randn(1, 2, length, dim)
        k = high[:, None] * 2 * direction + 0.5 * torch.randn(1, 2, length, dim)
    state, threshold = fresh_state(q, k, tile), -12.0
    for _ in range(3):
        call(q, k, k, state, now_at(), dim**-0.5, threshold, tile)
    scores = (q.double() @ k.double().mT) * (dim**-0.5 * LOG2_E)
    maxima = scores.unflatten(-1, (k_tiles, tile.k)).amax(-1)
    negligible = maxima <= maxima.amax(-1, keepdim=True) + threshold
    oracle = negligible.unflatten(2, (-1, tile.q)).all(3)
    marked = skipped_bits(state, length, tile)[0]
    assert oracle.float().mean() > 0.5
    assert not (marked & ~oracle).any()
    assert (marked & oracle).sum() >= 0.9 * oracle.sum()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), heads_per_kv=st.integers(1, 2), q_len=st.integers(1, 150),
    k_len=st.integers(1, 150), dim=st.sampled_from([8, 16, 40, 64]), dtype=st.sampled_from([*DTYPES, torch.float64]),
    tile=st.sampled_from([TileShape(16, 16), SMALL, TileShape(64, 64), TileShape(128, 64)]),
    strided=st.tuples(st.booleans(), st.booleans()), scale=st.sampled_from([-0.5, -0.125, 0.0, 0.125, 0.25, 1.0]),
    bias=st.sampled_from([None, *BIASES]), protected=st.lists(st.integers(0, 160), max_size=8), seed=st.integers(0, 9),
    numbers=st.none() | st.lists(st.integers(0, 2), min_size=40, max_size=40),
)  # fmt: skip
def test_any_shape_dtype_stride_and_scale(
    batch: int, kv_heads: int, heads_per_kv: int, q_len: int, k_len: int, dim: int, dtype: torch.dtype, tile: TileShape,
    strided: tuple[bool, bool], scale: float, bias: str | None, protected: list[int], seed: int,
    numbers: list[int] | None,
) -> None:  # fmt: skip
    q, k, v = (x.to(dtype) for x in clustered(batch, kv_heads * heads_per_kv, q_len, k_len, dim, seed))
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    if strided[0]:
        q, k = heads_last(q), heads_last(k)
    if strided[1]:
        v = v.mT.contiguous().mT
    key_bias = None if bias is None else padding_bias(bias, batch, k_len)
    ranges = sorted(protected[: len(protected) // 2 * 2])
    kinds = None
    if numbers is not None:
        tiles = tile_count(k_len, tile.k)
        kinds, hiding = kinds_of_tiles([0, *(numbers * tiles)[1:tiles]], k_len, tile)
        key_bias = hiding if key_bias is None else key_bias + hiding
    threshold = threshold_between(dim // 2, scale)
    follow_reference(q, k, v, scale, threshold, tile, calls=2, key_bias=key_bias, protected=ranges, kinds=kinds)
