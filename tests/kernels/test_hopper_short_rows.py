"""The Hopper kernel for short rows, its source run on a machine with random speeds, against the specification."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from gluon_machine import Machine
from gluon_memory import Descriptor, Pointer, block

from lite_compile.kernels.hopper_pipeline import CONSUMER_ROWS, HOPPER_TILE
from lite_compile.kernels.hopper_short_rows import MAX_TILES, attend_short_kernel
from lite_compile.kernels.visit_lists import range_arguments
from lite_compile.ops import (
    COMPUTED_TILE,
    HIDDEN_TILE,
    LOG2_E,
    NOW_EPOCH,
    NOW_SLOT,
    NOW_WORDS,
    attend_reference,
    first_tile,
    touched_tiles,
    visit_order,
)
from lite_compile.skip_state import EPOCH_WORD, pack_bits, row_layout, state_shape, tile_count, unpack_bits

STREAMS, EPOCH, DIM = 2, 9, 64


def random_state(batch: int, heads: int, q_len: int, k_len: int, valid: float) -> torch.Tensor:
    """Rows with random marks and anchors; a share of `valid` ones is of the running generation."""
    state = torch.zeros(state_shape(STREAMS, batch, heads, q_len, k_len, HOPPER_TILE), dtype=torch.int32)
    k_tiles = tile_count(k_len, HOPPER_TILE.k)
    layout = row_layout(k_tiles)
    rows = state.shape[:-1]
    state[..., EPOCH_WORD] = torch.where(torch.rand(rows) < valid, EPOCH, EPOCH - 1).int()
    for start, words, share in (
        (layout.anchor_start, layout.anchor_words, 0.3),
        (layout.mask_start, layout.mask_words, 0.6),
    ):
        state[..., start : start + words] = pack_bits(torch.rand(*rows, k_tiles) < share, words)
    return state


def visited(
    row: torch.Tensor | None, epoch: int, q_tile: int, q_len: int, k_len: int, protected: tuple[int, ...],
    key_tiles: torch.Tensor | None,
) -> list[int]:  # fmt: skip
    """The tiles that a program is to visit, in their order; `row`: of the state, None if it may not be used."""
    k_tiles, layout = tile_count(k_len, HOPPER_TILE.k), row_layout(tile_count(k_len, HOPPER_TILE.k))
    kinds = torch.zeros(k_tiles) if key_tiles is None else key_tiles
    skipped, anchors = torch.zeros(2, k_tiles, dtype=torch.bool)
    free = not touched_tiles(q_tile + 1, HOPPER_TILE.q, protected)[q_tile]
    if row is not None and int(row[EPOCH_WORD]) == epoch and free:
        anchors = unpack_bits(row[layout.anchor_start : layout.mask_start], k_tiles)
        computed = touched_tiles(k_tiles, HOPPER_TILE.k, protected) | (kinds == COMPUTED_TILE)
        skipped = unpack_bits(row[layout.mask_start :], k_tiles) & ~computed
    first = first_tile(q_tile, q_len, k_len, HOPPER_TILE)
    return visit_order(k_tiles, first, anchors, skipped | (kinds == HIDDEN_TILE)).tolist()


def run(
    workers: int, seed: int, shape: tuple[int, int, int, int, int], slot: int = 0, valid: float = 0.8,
    protected: tuple[int, ...] = (), has_kinds: bool = False, criterion: str = "max", qk: torch.dtype = torch.float16,
    bias_rows: int | None = None, has_lse: bool = True, nan_at: int | None = None,
) -> None:  # fmt: skip
    """Run the kernel; compare results, state, lists and counter with the specification.

    Args:
        bias_rows: of a bias other than that of hidden tiles.
        nan_at: this query of the last head is NaN.
    """
    torch.manual_seed(seed)
    batch, heads, kv_heads, q_len, k_len = shape
    q_tiles, k_tiles = tile_count(q_len, HOPPER_TILE.q), tile_count(k_len, HOPPER_TILE.k)
    programs, layout = batch * heads * q_tiles, row_layout(k_tiles)
    q, k, v = (
        torch.randn(batch, count, length, DIM, dtype=torch.float16)
        for count, length in ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    )
    # Some tiles matter to no row which has met one that does, so that the order shows in the marks.
    weight = torch.where(torch.rand(batch, kv_heads, k_tiles) < 0.5, 6.0, 0.1)
    q_scales = k_scales = None
    q_scale, k_scale = torch.ones(batch, heads, q_len, 1), torch.ones(batch, kv_heads, k_len, 1)
    if qk.itemsize == 1:
        q, k = ((x * 20).round().to(qk) for x in (q, k))
        q_scales = (1 + torch.rand(batch, heads, tile_count(q_len, CONSUMER_ROWS))) / 30
        k_scales = (1 + torch.rand(batch, kv_heads, k_tiles)) / 30 * weight
        q_scale = q_scales.repeat_interleave(CONSUMER_ROWS, 2)[:, :, :q_len, None]
        k_scale = k_scales.repeat_interleave(HOPPER_TILE.k, 2)[:, :, :k_len, None]
    else:
        k *= weight.repeat_interleave(HOPPER_TILE.k, 2)[:, :, :k_len, None]
    if nan_at is not None:
        q[-1, -1, nan_at] = math.nan
    state = random_state(batch, heads, q_len, k_len, valid)
    now = torch.zeros(NOW_WORDS, dtype=torch.int32)
    now[NOW_EPOCH], now[NOW_SLOT] = EPOCH, slot
    key_tiles = key_bias = flags = None
    if bias_rows is not None:
        key_bias = torch.randn(bias_rows, k_len)
        key_bias *= (torch.rand(bias_rows, k_tiles) < 0.5).repeat_interleave(HOPPER_TILE.k, 1)[:, :k_len]
    if has_kinds:
        key_tiles = torch.randint(0, 3, (k_tiles,), dtype=torch.int8)
        hidden = (key_tiles == HIDDEN_TILE).repeat_interleave(HOPPER_TILE.k)[:k_len]
        key_bias = (torch.zeros(batch, k_len) if key_bias is None else key_bias).masked_fill(hidden, -math.inf)
    if key_bias is not None:
        flags = torch.stack([part.ne(0).any(1) for part in key_bias.split(HOPPER_TILE.k, 1)], 1).to(torch.int8)
    scale, threshold = DIM**-0.5, torch.tensor(-3.0 if criterion == "max" else -1.0)
    before, expected_state = state.clone(), state.clone()
    expected, expected_lse = attend_reference(
        q.double() * q_scale, k.double() * k_scale, v.double(), expected_state, now, scale, threshold, HOPPER_TILE,
        key_bias, protected, criterion, key_tiles,
    )  # fmt: skip
    if nan_at is not None:  # a program that has met a NaN skips nothing next time
        expected_state[slot, -1, -1, nan_at // HOPPER_TILE.q, layout.mask_start :] = 0

    out = torch.full((batch, heads, q_len, DIM), 77.0, dtype=torch.float16)
    lse = torch.full((batch, heads, q_len), 77.0) if has_lse else None
    order = torch.full((programs, k_tiles), 9999, dtype=torch.int16)
    notes = torch.full((programs, 1 + 2 * k_tiles), 55, dtype=torch.int8)
    counter = torch.zeros(2, dtype=torch.int32)
    blocks = [
        Descriptor(x, rows, DIM)
        for x, rows in ((q, CONSUMER_ROWS), (k, HOPPER_TILE.k), (v, HOPPER_TILE.k), (out, CONSUMER_ROWS))
    ]
    bias_stride = k_len if key_bias is not None and len(key_bias) > 1 else 0
    lengths = (programs, heads, heads // kv_heads, q_len, k_len, q_tiles, k_tiles, bias_stride, STREAMS)
    pointers = [
        None if x is None else Pointer(x)
        for x in (lse, key_bias, flags, q_scales, k_scales, state, now, key_tiles, order, notes, counter)
    ]
    Machine(seed).run(
        attend_short_kernel, workers,
        [
            *blocks, *pointers, *map(block, (*lengths, *range_arguments(protected))), scale * LOG2_E,
            Pointer(threshold), has_lse, key_bias is not None, 8 * qk.itemsize, criterion == "mass", has_kinds,
            len(protected) > 0,
        ],
    )  # fmt: skip

    assert torch.equal(out.isnan(), expected.isnan())
    assert (out.double() - expected).nan_to_num(0.0).norm() <= 2e-3 * expected.nan_to_num(0.0).norm()
    if lse is not None:  # in 8 bits the kernel counts on fused multiply-add, which the machine has not
        precision = 1e-3 if qk.itemsize > 1 else 1e-2
        assert torch.allclose(lse.double(), expected_lse, rtol=0, atol=precision, equal_nan=True)
    marks, read = (unpack_bits(x[..., layout.mask_start :], k_tiles) for x in (state, before))
    if marks.numel() > 100:  # else chance may have it that nothing is marked
        assert 0.05 < marks.float().mean() < 0.95
        assert torch.equal(marks, read) is not (0 <= slot < STREAMS)
    assert torch.equal(state, expected_state)
    for program, row in enumerate(order.tolist()):
        (b, h), q_tile = divmod(program // q_tiles, heads), program % q_tiles
        found = before[slot, b, h, q_tile] if 0 <= slot < STREAMS else None
        tiles = visited(found, EPOCH, q_tile, q_len, k_len, protected, key_tiles)
        assert row == tiles + [9999] * (k_tiles - len(tiles))
    assert counter.tolist() == [0, 0]


SHAPES = {
    "few tiles": (1, 2, 1, 250, 300),
    "shared keys": (2, 2, 1, 500, 700),
    "one word": (1, 2, 1, 300, 32 * 128),
    "two words": (1, 2, 1, 300, 33 * 128 - 5),
    "all bits": (1, 1, 1, 500, MAX_TILES * 128),
    "one tile": (1, 2, 2, 200, 100),
    "more keys than queries": (1, 2, 1, 385, 40 * 128 + 1),
    "more queries than keys": (1, 1, 1, 1500, 300),
    "groups of heads": (2, 4, 2, 100, 400),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_read_and_written_as_specified(workers: int, shape: tuple[int, int, int, int, int]) -> None:
    for seed in range(2):
        run(workers, seed, shape)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 32, 33, MAX_TILES])
def test_one_program_in_all(tiles: int) -> None:
    for seed in range(4):
        run(1, seed, (1, 1, 1, 150, tiles * 128 - 3), valid=seed % 2)


@pytest.mark.parametrize(("slot", "valid"), [(-1, 1.0), (0, 0.0), (1, 1.0), (STREAMS, 1.0)], ids=str)
def test_rows_of_other_generations_and_slots(slot: int, valid: float) -> None:
    run(3, 0, (1, 3, 3, 500, 1000), slot, valid)


@pytest.mark.parametrize("criterion", ["max", "mass"])
@pytest.mark.parametrize("has_kinds", [False, True])
@pytest.mark.parametrize("protected", [(), (0, 130), (100, 130, 600, 601)], ids=str)
def test_ranges_and_kinds_of_tiles(protected: tuple[int, ...], has_kinds: bool, criterion: str) -> None:
    run(2, 1, (1, 2, 1, 600, 1500), protected=protected, has_kinds=has_kinds, criterion=criterion)


def test_ranges_in_the_second_word_and_four_of_them() -> None:
    run(1, 2, (1, 1, 1, 400, 50 * 128), protected=(10, 11, 300, 301, 4090, 4110, 6000, 6400))


@pytest.mark.parametrize("qk", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("bias_rows", [None, 1, 2])
@pytest.mark.parametrize("workers", [1, 5])
def test_products_in_8_bits(workers: int, bias_rows: int | None, qk: torch.dtype) -> None:
    for seed in range(3):
        run(workers, seed, (2, 4, 2, 350, 520), qk=qk, bias_rows=bias_rows, has_lse=seed > 0)


@pytest.mark.parametrize("bias_rows", [1, 2])
@pytest.mark.parametrize("has_kinds", [False, True])
def test_biases(bias_rows: int, has_kinds: bool) -> None:
    run(2, 0, (2, 2, 1, 250, 900), bias_rows=bias_rows, has_kinds=has_kinds, has_lse=False)


def test_rows_with_a_nan_skip_nothing() -> None:
    run(2, 0, (1, 2, 1, 500, 700), nan_at=200, valid=1.0)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_partitions_wait_for_each_other(workers: int) -> None:
    for seed in range(6):
        run(workers, seed, (2, 2, 1, 350, 520))
