"""From skip bits to a list of key tiles, and back: what surrounds an attention kernel that only reads lists.

`ops.visit_order` is the specification of the order, `skip_state` of the bits. One program per tile of queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ..ops import COMPUTED_TILE, HIDDEN_TILE, MAX_PROTECTED, NOW_EPOCH, NOW_SLOT
from ..skip_state import COMPUTED_WORD, EPOCH_WORD, HEADER_WORDS

EPOCH, COMPUTED, HEADER = (tl.constexpr(word) for word in (EPOCH_WORD, COMPUTED_WORD, HEADER_WORDS))
_NOW_EPOCH, _NOW_SLOT = tl.constexpr(NOW_EPOCH), tl.constexpr(NOW_SLOT)
_COMPUTED_TILE, _HIDDEN_TILE = tl.constexpr(COMPUTED_TILE), tl.constexpr(HIDDEN_TILE)
BLOCK = tl.constexpr(512)
"""Tiles whose state bits are handled at once."""
SIZES = (
    "streams", "q_len", "k_len", "q_tiles", "k_tiles", "row_words", "anchor_words", "anchor_group",
    "start_0", "end_0", "start_1", "end_1", "start_2", "end_2", "start_3", "end_3",
)  # fmt: skip
"""Arguments that change from shape to shape and gain nothing by being compiled in."""


def range_arguments(protected: Sequence[int]) -> list[int]:
    """Starts and ends of the protected ranges as the kernels take them: always four, those not needed empty."""
    return [*protected, *[0] * (2 * MAX_PROTECTED - len(protected))]


@triton.jit
def is_free(tile, size, protected):
    """Whether a tile of `size` positions touches none of the four ranges `(start, end, start, end, ...)`."""
    start = tile * size
    free = tl.minimum(start + size, protected[1]) <= tl.maximum(start, protected[0])
    free &= tl.minimum(start + size, protected[3]) <= tl.maximum(start, protected[2])
    free &= tl.minimum(start + size, protected[5]) <= tl.maximum(start, protected[4])
    free &= tl.minimum(start + size, protected[7]) <= tl.maximum(start, protected[6])
    return free


@triton.jit
def find_row(state, now, program, streams, row_words):
    """`(row, epoch, recording, valid)`: the program's row of the state, whether it may be used and whether its bits
    were written in this generation."""
    epoch = tl.load(now + _NOW_EPOCH)
    slot = tl.load(now + _NOW_SLOT)
    recording = (slot >= 0) & (slot < streams)
    row = state + (tl.where(recording, slot, 0).to(tl.int64) * tl.num_programs(0) + program) * row_words
    valid = recording & (tl.load(row + EPOCH, mask=recording, other=0) == epoch)
    return row, epoch, recording, valid


@triton.jit
def _read_ring(
    row, recorded, protected, key_tiles, start, first, k_tiles, anchor_words, anchor_group,
    TILE_K: tl.constexpr, HAS_KINDS: tl.constexpr,
):  # fmt: skip
    """Tiles at the places `start ...` of the ring, and whether each is an anchor to visit, another to visit, skipped.

    All are int32 `[BLOCK]`, the last three 0 or 1, and 0 past the end of the ring. `recorded`: `k_tiles`, or 0 if the
    row is to be read as empty. `key_tiles`: int8 `[k_tiles]`, kinds of tiles; looked at if `HAS_KINDS`.
    """
    place = start + tl.arange(0, BLOCK)
    tile = first + place
    tile = tl.where(tile >= k_tiles, tile - k_tiles, tile)
    group = tile // anchor_group
    skip_word = tl.load(row + HEADER + anchor_words + tile // 32, mask=place < recorded, other=0)
    anchor_word = tl.load(row + HEADER + group // 32, mask=place < recorded, other=0)
    skipped = tl.where(is_free(tile, TILE_K, protected), (skip_word >> (tile % 32)) & 1, 0)
    if HAS_KINDS:
        kind = tl.load(key_tiles + tile, mask=place < k_tiles, other=0)
        skipped = tl.where(kind == _COMPUTED_TILE, 0, tl.where(kind == _HIDDEN_TILE, 1, skipped))
    anchor = (anchor_word >> (group % 32)) & 1
    kept = tl.where(place < k_tiles, 1 - skipped, 0)
    return tile, kept & anchor, kept & (1 - anchor), skipped


@triton.jit
def write_order(
    row, recorded, protected, key_tiles, order, marks, first, k_tiles, anchor_words, anchor_group,
    TILE_K: tl.constexpr, HAS_KINDS: tl.constexpr,
):  # fmt: skip
    """Write the tiles to compute into `order` in `ops.visit_order`, 1 into `marks` of the others; return how many."""
    anchor_count = 0
    for start in range(0, k_tiles, BLOCK):
        _, anchor, _, _ = _read_ring(
            row, recorded, protected, key_tiles, start, first, k_tiles, anchor_words, anchor_group, TILE_K, HAS_KINDS
        )
        anchor_count += tl.sum(anchor, 0)
    anchor_end = 0
    other_end = anchor_count
    for start in range(0, k_tiles, BLOCK):
        tile, anchor, other, skipped = _read_ring(
            row, recorded, protected, key_tiles, start, first, k_tiles, anchor_words, anchor_group, TILE_K, HAS_KINDS
        )
        position = tl.where(anchor == 1, anchor_end + tl.cumsum(anchor, 0), other_end + tl.cumsum(other, 0)) - 1
        tl.store(order + position, tile.to(order.dtype.element_ty), mask=(anchor | other) == 1)
        tl.store(marks + tile, skipped.to(marks.dtype.element_ty), mask=skipped == 1)
        anchor_end += tl.sum(anchor, 0)
        other_end += tl.sum(other, 0)
    return other_end


@triton.jit
def write_marks(
    row, marks, markable, protected, key_tiles, k_tiles, anchor_words, TILE_K: tl.constexpr, HAS_KINDS: tl.constexpr
):
    """Pack `marks`, one number per tile, into a row's skip bits. `markable`: `k_tiles`, or 0 if it may skip none."""
    bit = tl.arange(0, 32)[None, :]
    for start in range(0, tl.cdiv(k_tiles, 32), BLOCK // 32):
        word = start + tl.arange(0, BLOCK // 32)
        tile = word[:, None] * 32 + bit
        free = (tile < markable) & is_free(tile, TILE_K, protected)
        if HAS_KINDS:
            free &= tl.load(key_tiles + tile, mask=tile < markable, other=0) != _COMPUTED_TILE
        marked = tl.load(marks + tile, mask=free, other=0).to(tl.int32)
        tl.store(row + HEADER + anchor_words + word, tl.reduce_or(marked << bit, 1), mask=word * 32 < k_tiles)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["state", "now", "key_tiles"])
def list_visits(
    state, now, key_tiles, order, counts, notes,
    streams, q_len, k_len, q_tiles, k_tiles, row_words, anchor_words, anchor_group,
    start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HAS_KINDS: tl.constexpr,
):  # fmt: skip
    """Per program the key tiles to visit and their number; and `notes` as `record_visits` wants to find them.

    Args:
        key_tiles: int8 `[k_tiles]`, kinds of tiles as `ops.attend_reference` has them; None if not `HAS_KINDS`.
        order: int16 or int32 `[programs, k_tiles]`.
        counts: int32 `[programs + 1]`; last a 0, for an attention kernel to count the programs that it has begun.
        notes: int8 `[programs, 1 + 2 * k_tiles]`: 0, a 1 for each key tile, a 0 for each key tile.
    """
    protected = (start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3)
    program = tl.program_id(0)
    q_tile = program % q_tiles
    row, _, _, valid = find_row(state, now, program, streams, row_words)
    recorded = tl.where(valid & is_free(q_tile, TILE_Q, protected), k_tiles, 0)
    first = ((q_tile.to(tl.int64) * TILE_Q * k_len // q_len) // TILE_K).to(tl.int32)
    order += program.to(tl.int64) * k_tiles
    notes += program.to(tl.int64) * (1 + 2 * k_tiles)
    count = write_order(
        row,
        recorded,
        protected,
        key_tiles,
        order,
        notes + 1,
        first,
        k_tiles,
        anchor_words,
        anchor_group,
        TILE_K,
        HAS_KINDS,
    )
    tl.store(counts + program, count)
    tl.store(counts + tl.num_programs(0), 0, mask=program == 0)
    for start in range(0, 1 + 2 * k_tiles, BLOCK):
        place = start + tl.arange(0, BLOCK)
        marked = (place > 0) & (place <= k_tiles)
        tl.store(notes + place, marked.to(tl.int8), mask=place <= 2 * k_tiles)


@triton.jit
def _sum_row(counts, row, rows, row_length, ROWS: tl.constexpr):
    """Sums of `ROWS` rows of `counts` `[rows, row_length]` from `row` on; -1 for rows that are none."""
    member = row + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.int64)
    for start in range(0, row_length, 64):
        column = start + tl.arange(0, 64)
        inside = (member < rows)[:, None] & (column < row_length)[None, :]
        place = member.to(tl.int64)[:, None] * row_length + column[None, :]
        total += tl.sum(tl.load(counts + place, mask=inside, other=0).to(tl.int64), 1)
    return tl.where(member < rows, total, -1)


@triton.jit(do_not_specialize=["q_tiles"])
def queue_programs(counts, queue, q_tiles):
    """The order in which programs should run, so that none with much to do is left for the end. One program per head.

    Heads with the most tiles first, and within a head the rows with the most tiles first; but head after head, since
    programs that run at the same time should share keys and values in the cache.

    Args:
        counts: int32 `[heads, q_tiles]`.
        queue: int64 `[heads, q_tiles]`: number of the program << 32 | its count.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    own = tl.sum(_sum_row(counts, head, head + 1, q_tiles, 1), 0)
    before = head * 0
    for start in range(0, heads, 16):
        other = start + tl.arange(0, 16)
        total = _sum_row(counts, start, heads, q_tiles, 16)
        before += tl.sum(((total > own) | ((total == own) & (other < head))).to(tl.int32), 0)
    counts += head.to(tl.int64) * q_tiles
    queue += before.to(tl.int64) * q_tiles
    for start in range(0, q_tiles, 64):
        row = start + tl.arange(0, 64)
        count = tl.load(counts + row, mask=row < q_tiles, other=0)
        rank = tl.zeros([64], tl.int32)
        for other_start in range(0, q_tiles, 64):
            other = other_start + tl.arange(0, 64)
            length = tl.load(counts + other, mask=other < q_tiles, other=-1)[None, :]
            first = (length > count[:, None]) | ((length == count[:, None]) & (other[None, :] < row[:, None]))
            rank += tl.sum(first.to(tl.int32), 1)
        entry = ((head * q_tiles + row).to(tl.int64) << 32) | count.to(tl.int64)
        tl.store(queue + rank, entry, mask=row < q_tiles)


@triton.jit(do_not_specialize=["k_len"], do_not_specialize_on_alignment=["key_bias"])
def flag_biased(key_bias, flags, k_len, TILE_K: tl.constexpr):
    """int8 `[B, k_tiles]`: whether a key of the tile has a bias other than 0. One program per tile and batch entry."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    key = tile * TILE_K + tl.arange(0, TILE_K)
    bias = tl.load(key_bias + batch.to(tl.int64) * k_len + key, mask=key < k_len, other=0.0)
    tl.store(flags + batch * tl.num_programs(0) + tile, tl.max((bias != 0.0).to(tl.int32), 0).to(tl.int8))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["state", "now", "key_tiles"])
def record_visits(
    state, now, key_tiles, counts, notes,
    streams, q_len, k_len, q_tiles, k_tiles, row_words, anchor_words, anchor_group,
    start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HAS_KINDS: tl.constexpr,
):  # fmt: skip
    """Turn the notes of an attention kernel into the program's row of the state.

    Args:
        notes: as `list_visits` left them, but for what the kernel wrote: first a 1 if a row has met a NaN, so that no
            tile may be skipped; then a 0 for each key tile that mattered to a row; then a 1 for each that held a
            row's maximum.
    """
    protected = (start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3)
    program = tl.program_id(0)
    row, epoch, recording, _ = find_row(state, now, program, streams, row_words)
    if recording:
        notes += program.to(tl.int64) * (1 + 2 * k_tiles)
        markable = tl.where(is_free(program % q_tiles, TILE_Q, protected) & (tl.load(notes) == 0), k_tiles, 0)
        tl.store(row + EPOCH, epoch)
        tl.store(row + COMPUTED, tl.load(counts + program))
        lane = tl.arange(0, 32)
        for i in range(anchor_words):
            raised = tl.zeros([32], tl.int32)
            for member in range(anchor_group):
                tile = (i * 32 + lane) * anchor_group + member
                raised |= tl.load(notes + 1 + k_tiles + tile, mask=tile < k_tiles, other=0).to(tl.int32)
            tl.store(row + HEADER + i, tl.reduce_or(raised << lane, 0))
        write_marks(row, notes + 1, markable, protected, key_tiles, k_tiles, anchor_words, TILE_K, HAS_KINDS)
