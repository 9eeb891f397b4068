"""`list_visits` and `record_visits` in Triton's interpreter around a plain loop, against `attend_reference` in float64.

The loop stands for the attention kernel between them, which the interpreter cannot run: it reads the lists and takes
notes as `attend_hopper` does. `test_interpreter.py` runs this file in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from attend_cases import make_now, make_qkv
from torch import Tensor

from lite_compile.kernels.visit_lists import list_visits, range_arguments, record_visits
from lite_compile.ops import COMPUTED_TILE, HIDDEN_TILE, LOG2_E, attend_reference
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

TILE = TileShape(24, 16)
SCALE, THRESHOLD = 0.5, -6.0


def take_notes(q: Tensor, k: Tensor, order: Tensor, counts: Tensor, notes: Tensor) -> None:
    """What the attention kernel notes about the tiles it visits."""
    k_tiles = tile_count(k.shape[2], TILE.k)
    rows = [part for head in q.flatten(0, 1) for part in head.split(TILE.q)]
    heads = [head for head in k.flatten(0, 1) for _ in range(tile_count(q.shape[2], TILE.q))]
    for program, (row, head) in enumerate(zip(rows, heads, strict=True)):
        running = row.new_full((row.shape[0],), -math.inf)
        argmax_tile = torch.zeros(row.shape[0], dtype=torch.int64)
        for t in order[program, : counts[program]].tolist():
            tile_max = (row @ head[t * TILE.k : (t + 1) * TILE.k].T).amax(1) * (SCALE * LOG2_E)
            if not bool((tile_max - running <= THRESHOLD).all()):
                notes[program, 1 + t] = 0
            argmax_tile = torch.where(tile_max > running, t, argmax_tile)
            running = torch.maximum(running, tile_max)
        notes[program, 0] |= int(running.isnan().any())
        notes[program, 1 + k_tiles + argmax_tile] = 1


def attend(
    q: Tensor, k: Tensor, state: Tensor, now: Tensor, protected: tuple[int, ...] = (), kinds: Tensor | None = None
) -> Tensor:
    """Both kernels with the loop in between; the lists, -1 after their ends."""
    q_tiles, k_tiles = tile_count(q.shape[2], TILE.q), tile_count(k.shape[2], TILE.k)
    layout, programs = row_layout(k_tiles), q.shape[0] * q.shape[1] * q_tiles
    order = torch.full((programs, k_tiles), -1, dtype=torch.int16)
    counts = torch.full((programs + 1,), -1, dtype=torch.int32)
    notes = torch.full((programs, 1 + 2 * k_tiles), 77, dtype=torch.int8)
    sizes = (
        state.shape[0], q.shape[2], k.shape[2], q_tiles, k_tiles, layout.words, layout.anchor_words,
        layout.anchor_group, *range_arguments(protected),
    )  # fmt: skip
    tiles = {"TILE_Q": TILE.q, "TILE_K": TILE.k, "HAS_KINDS": kinds is not None}
    list_visits[(programs,)](state, now, kinds, order, counts, notes, *sizes, **tiles)
    assert counts[programs] == 0
    take_notes(q, k, order, counts, notes)
    record_visits[(programs,)](state, now, kinds, counts, notes, *sizes, **tiles)
    return order


def new_states(q: Tensor, k: Tensor, streams: int = 1) -> tuple[Tensor, Tensor]:
    shape = state_shape(streams, q.shape[0], q.shape[1], q.shape[2], k.shape[2], TILE)
    return torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize("protected", [(), (0, 5), (3, 20, 60, 61, 100, 130)], ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(96, 96), (50, 130), (1, 16), (24, 16 * 520 + 5)])
def test_states_equal_the_reference(q_len: int, k_len: int, protected: tuple[int, ...]) -> None:
    q, k, v = (x.double() for x in make_qkv(1, 2, q_len, k_len, 16))
    state, expected = new_states(q, k, streams=2)
    for step in range(3):
        attend(q, k, state, make_now(slot=1), protected)
        attend_reference(q, k, v, expected, make_now(slot=1), SCALE, torch.tensor(THRESHOLD), TILE, None, protected)
        assert torch.equal(state, expected), f"step {step}"
    k_tiles = tile_count(k_len, TILE.k)
    assert k_len < 50 or protected or unpack_bits(state[1, ..., row_layout(k_tiles).mask_start :], k_tiles).any()


def test_kinds_of_key_tiles_follow_the_reference() -> None:
    q, k, v = (x.double() for x in make_qkv(1, 2, 96, 16 * 520 + 5, 16))
    state, expected = new_states(q, k, streams=2)
    kinds = torch.randint(0, 3, (521,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    for slot in (1, 1, 1, -1):
        order = attend(q, k, state, make_now(slot=slot), (3, 20), kinds)
        given = {"protected": (3, 20), "key_tiles": kinds}
        attend_reference(q, k, v, expected, make_now(slot=slot), SCALE, torch.tensor(THRESHOLD), TILE, **given)
        assert torch.equal(state, expected)
        for row in order:
            listed = row[row >= 0].long()
            assert not (kinds[listed] == HIDDEN_TILE).any()
            assert (kinds[listed] == COMPUTED_TILE).sum() == (kinds == COMPUTED_TILE).sum()


def test_every_tile_is_listed_once_where_nothing_may_be_skipped() -> None:
    q, k, _ = (x.double() for x in make_qkv(1, 1, 48, 130, 16))
    state, _ = new_states(q, k)
    attend(q, k, state, make_now())
    before = state.clone()
    for now in (make_now(slot=-1), make_now(slot=1), make_now(epoch=8)):
        order = attend(q, k, state, now)
        assert torch.equal(order.sort(1).values, torch.arange(9, dtype=torch.int16).expand(2, 9))
        if now[2] != 0:
            assert torch.equal(state, before)


def test_a_row_that_met_nan_skips_nothing() -> None:
    q, k, _ = (x.double() for x in make_qkv(1, 1, 24, 130, 16))
    state, _ = new_states(q, k)
    attend(q, k, state, make_now())
    start = row_layout(9).mask_start
    assert state[..., start:].any()
    q[0, 0, 3] = math.nan
    attend(q, k, state, make_now())
    assert not state[..., start:].any()
