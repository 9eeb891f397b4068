"""Attention over rows of up to 64 key tiles in one launch: the workers read the skip bits and write them themselves.

Longer rows need lists (visit_lists.py), and an order in which programs run. Here a row's tiles are the bits of one
integer, which the producer ranks in `ops.visit_order`; and it packs the marks of a program while the consumers compute
the next one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..ops import COMPUTED_TILE, HIDDEN_TILE, NOW_EPOCH, NOW_SLOT
from ..skip_state import COMPUTED_WORD, EPOCH_WORD, HEADER_WORDS
from .gluon_adapter import thread_barrier
from .hopper_consumers import consume
from .hopper_pipeline import (
    CONSUMERS,
    ROWS,
    TILE_K,
    allocate,
    announce,
    announce_end,
    heads_of,
    load_tile,
    marking_limit,
)

MAX_TILES = 64
_LISTED_BEFORE = gl.constexpr(3)
"""So many tiles before the end of a program the producer takes the next one and reads its row: as late as hides it."""
_EPOCH, _COMPUTED, _HEADER = gl.constexpr(EPOCH_WORD), gl.constexpr(COMPUTED_WORD), gl.constexpr(HEADER_WORDS)
_NOW_EPOCH, _NOW_SLOT = gl.constexpr(NOW_EPOCH), gl.constexpr(NOW_SLOT)
_COMPUTED_TILE, _HIDDEN_TILE = gl.constexpr(COMPUTED_TILE), gl.constexpr(HIDDEN_TILE)
_LOW_WORD = gl.constexpr(0xFFFFFFFF)
_PAIRS, _QUADS, _BYTES = (
    gl.constexpr(0x5555555555555555),
    gl.constexpr(0x3333333333333333),
    gl.constexpr(0x0F0F0F0F0F0F0F0F),
)
_BYTE_ONES = gl.constexpr(0x0101010101010101)


@gluon.jit
def _is_free(tile, size, protected):
    """Whether tiles of `size` positions touch none of the four ranges `(start, end, start, end, ...)`."""
    start = tile * size
    free = gl.minimum(start + size, protected[1]) <= gl.maximum(start, protected[0])
    free = free & (gl.minimum(start + size, protected[3]) <= gl.maximum(start, protected[2]))
    free = free & (gl.minimum(start + size, protected[5]) <= gl.maximum(start, protected[4]))
    return free & (gl.minimum(start + size, protected[7]) <= gl.maximum(start, protected[6]))


@gluon.jit
def _kinds_of_tiles(key_tiles, k_tiles, protected, HAS_KINDS: gl.constexpr):
    """int64 bits: which key tiles are always computed, and which never."""
    tile = gl.arange(0, 64, gl.BlockedLayout([2], [32], [1], [0]))
    must = gl.where(_is_free(tile, TILE_K, protected), 0, 1)
    hide = must * 0
    if HAS_KINDS:
        kind = gl.load(key_tiles + tile, mask=tile < k_tiles, other=0)
        must = gl.where(kind == _COMPUTED_TILE, 1, must)
        hide = gl.where(kind == _HIDDEN_TILE, 1, 0)
    return gl.sum(must.to(gl.int64) << tile.to(gl.int64), 0), gl.sum(hide.to(gl.int64) << tile.to(gl.int64), 0)


@gluon.jit
def _load_bits(words, number, usable):
    """int64: the bits of one or two int32 words."""
    low = gl.load(words, mask=usable, other=0).to(gl.int64) & _LOW_WORD
    high = gl.load(words + 1, mask=usable & (number > 1), other=0).to(gl.int64)
    return low | (high << 32)


@gluon.jit
def _store_bits(words, number, bits, wanted):
    gl.store(words, bits.to(gl.int32), mask=wanted)
    gl.store(words + 1, (bits >> 32).to(gl.int32), mask=wanted & (number > 1))


@gluon.jit
def _count_bits(bits):
    bits = bits - ((bits >> 1) & _PAIRS)
    bits = (bits & _QUADS) + ((bits >> 2) & _QUADS)
    bits = (bits + (bits >> 4)) & _BYTES
    return ((bits * _BYTE_ONES) >> 56).to(gl.int32) & 127


@gluon.jit
def _ones(count):
    """int64: the lowest `count` bits, 1 to 64."""
    highest = (count * 0 + 1).to(gl.int64) << (count - 1).to(gl.int64)
    return (highest - 1) | highest


@gluon.jit
def _list_row(row, order, noted, first, epoch, recording, must, hidden, q_free, words, k_tiles):
    """Write the tiles that a program visits into `order`, as `ops.visit_order` has them, and begin its notes.

    Returns how many they are.
    """
    usable = recording & q_free
    usable = usable & (gl.load(row + _EPOCH, mask=usable, other=0) == epoch)
    anchors = _load_bits(row + _HEADER, words, usable)
    skipped = (_load_bits(row + _HEADER + words, words, usable) & ~must) | hidden
    kept = _ones(k_tiles) & ~skipped
    # From here on by places in the ring, which begins with tile `first`.
    left = k_tiles - first
    kept = ((kept >> first.to(gl.int64)) & _ones(left)) | gl.where(first > 0, kept << left.to(gl.int64), 0)
    anchors = ((anchors >> first.to(gl.int64)) & _ones(left)) | gl.where(first > 0, anchors << left.to(gl.int64), 0)
    kept = kept & _ones(k_tiles)
    anchors = anchors & kept
    place = gl.arange(0, 64, gl.BlockedLayout([2], [32], [1], [0]))
    before = ((place * 0 + 1).to(gl.int64) << place.to(gl.int64)) - 1
    tile = first + place
    tile = gl.where(tile >= k_tiles, tile - k_tiles, tile)
    is_anchor = ((anchors >> place.to(gl.int64)) & 1) != 0
    is_kept = ((kept >> place.to(gl.int64)) & 1) != 0
    others_before = _count_bits(anchors) + _count_bits(kept & ~anchors & before)
    rank = gl.where(is_anchor, _count_bits(anchors & before), others_before)
    gl.store(order + rank, tile.to(order.dtype.element_ty), mask=is_kept)
    each = gl.arange(0, 256, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(noted + each, ((each > 0) & (each <= k_tiles)).to(gl.int8), mask=each <= 2 * k_tiles)
    return _count_bits(kept)


@gluon.jit
def _list_program(
    program, rows, orders, notes, epoch, recording, must, hidden, words, row_words, q_tiles, q_len, k_tiles, k_len,
    protected,
):  # fmt: skip
    """`_list_row` of that program."""
    q_tile = program % q_tiles
    first = ((q_tile * (CONSUMERS * ROWS)).to(gl.int64) * k_len // q_len).to(gl.int32) // TILE_K
    place = program.to(gl.int64)
    count = _list_row(
        rows + place * row_words, orders + place * k_tiles, notes + place * (1 + 2 * k_tiles), first, epoch, recording,
        must, hidden, _is_free(q_tile, CONSUMERS * ROWS, protected), words, k_tiles,
    )  # fmt: skip
    thread_barrier()  # what the threads have written is read by others from here on
    return count


@gluon.jit
def _write_row(
    program, rows, notes, count, epoch, recording, must, words, row_words, q_tiles, k_tiles, protected,
):  # fmt: skip
    """Pack a program's notes into its row of the state."""
    row = rows + program.to(gl.int64) * row_words
    noted = notes + program.to(gl.int64) * (1 + 2 * k_tiles)
    tile = gl.arange(0, 64, gl.BlockedLayout([2], [32], [1], [0]))
    inside = recording & (tile < k_tiles)
    marked = gl.load(noted + 1 + tile, mask=inside, other=0).to(gl.int64)
    raised = gl.load(noted + 1 + k_tiles + tile, mask=inside, other=0).to(gl.int64)
    markable = _is_free(program % q_tiles, CONSUMERS * ROWS, protected)
    markable = markable & (gl.load(noted, mask=recording, other=0) == 0)
    marks = gl.sum(marked << tile.to(gl.int64), 0) & ~must
    gl.store(row + _EPOCH, epoch, mask=recording)
    gl.store(row + _COMPUTED, count, mask=recording)
    _store_bits(row + _HEADER, words, gl.sum(raised << tile.to(gl.int64), 0), recording)
    _store_bits(row + _HEADER + words, words, gl.where(markable, marks, 0), recording)


@gluon.jit
def _produce(
    descriptors, extras, queries, ring, lists, done, memory, protected, counter, programs, sizes, k_len, bias_stride,
    streams, QK_BITS: gl.constexpr, HAS_KINDS: gl.constexpr,
):  # fmt: skip
    """One program after the other: load its queries and the tiles that it visits.

    While the consumers are busy with the first of them, write the row of the program before and read the next one's.
    """
    orders, notes = lists
    state, now, key_tiles = memory
    heads, heads_per_kv, q_tiles, q_len, k_tiles = sizes
    epoch = gl.load(now + _NOW_EPOCH)
    slot = gl.load(now + _NOW_SLOT)
    recording = (slot >= 0) & (slot < streams)
    words = (k_tiles + 31) // 32
    row_words = _HEADER + 2 * words
    rows = state + gl.where(recording, slot, 0).to(gl.int64) * programs * row_words
    must, hidden = _kinds_of_tiles(key_tiles, k_tiles, protected, HAS_KINDS)

    program = gl.program_id(0)
    turn = program * 0
    round = program * 0
    # Not `program`: where two loop variables begin equal and one takes the other's value, MLIR drops that one.
    before = program * 0
    count_before = program * 0
    count = _list_program(
        program, rows, orders, notes, epoch, recording, must, hidden, words, row_words, q_tiles, q_len, k_tiles, k_len,
        protected,
    )  # fmt: skip
    while program < programs:
        batch, head, kv_head = heads_of(program, heads, q_tiles, heads_per_kv)
        order = orders + program.to(gl.int64) * k_tiles
        tile = gl.load(order, mask=count > 0, other=0).to(gl.int32)
        ahead = gl.minimum(count, 1)
        for _ in range(ahead):  # a tile before the queries, whose place is freed last
            load_tile(descriptors, ring, turn, batch, kv_head, tile, QK_BITS)
        place = batch, head, kv_head
        announce(
            descriptors[0], extras, queries, lists, sizes, place, program, count, turn, round, bias_stride, QK_BITS
        )
        tile = gl.load(order + 1, mask=count > 1, other=0).to(gl.int32)
        next_count = count * 0
        next_program = program
        listed_at = gl.maximum(count - _LISTED_BEFORE, 1)
        for n in range(ahead, gl.maximum(count, 2)):
            if n < count:
                this_tile = tile
                tile = gl.load(order + n + 1, mask=n + 1 < count, other=0).to(gl.int32)
                load_tile(descriptors, ring, turn + n, batch, kv_head, this_tile, QK_BITS)
            if (n == 1) & (round > 0):
                mbarrier.wait(done.index((round - 1) & 1), ((round - 1) >> 1) & 1)
                _write_row(
                    before, rows, notes, count_before, epoch, recording, must, words, row_words, q_tiles, k_tiles,
                    protected,
                )  # fmt: skip
            if n == listed_at:
                next_program = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
                if next_program < programs:
                    next_count = _list_program(
                        next_program, rows, orders, notes, epoch, recording, must, hidden, words, row_words, q_tiles,
                        q_len, k_tiles, k_len, protected,
                    )  # fmt: skip
        turn += count
        round += 1
        count_before = count
        before = program
        count = next_count
        program = next_program
    announce_end(queries, round)
    mbarrier.wait(done.index((round - 1) & 1), ((round - 1) >> 1) & 1)
    _write_row(before, rows, notes, count_before, epoch, recording, must, words, row_words, q_tiles, k_tiles, protected)
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:  # the last worker leaves it as the next call wants it
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit(
    do_not_specialize=[
        "programs", "heads", "heads_per_kv", "q_len", "k_len", "q_tiles", "k_tiles", "bias_stride", "streams",
        "start_0", "end_0", "start_1", "end_1", "start_2", "end_2", "start_3", "end_3",
    ],
    do_not_specialize_on_alignment=["lse", "key_bias", "threshold", "state", "now", "key_tiles", "counter"],
)  # fmt: skip
def attend_short_kernel(
    q_desc, k_desc, v_desc, o_desc, lse, key_bias, biased, q_scales, k_scales, state, now, key_tiles, order, notes,
    counter, programs, heads, heads_per_kv, q_len, k_len, q_tiles, k_tiles, bias_stride, streams,
    start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3, qk_scale, threshold,
    HAS_LSE: gl.constexpr, HAS_BIAS: gl.constexpr, QK_BITS: gl.constexpr, BY_MASS: gl.constexpr,
    HAS_KINDS: gl.constexpr, HAS_RANGES: gl.constexpr,
):  # fmt: skip
    """Tiles of queries, one per program; at most as many workers as there are programs take them by turns.

    Args:
        state, now, key_tiles: as `ops.attend_reference` has them.
        counter: int32 `[2]`, zeros, which they are again in the end: programs that were taken, workers that are done.
        order: int16 `[programs, k_tiles]`, overwritten.
        notes: int8 `[programs, 1 + 2 * k_tiles]`, overwritten.
        The others: as in `hopper_workers.attend_kernel`.
    """
    limit = marking_limit(threshold, k_tiles, BY_MASS)
    queries, ring, o_smem, turns = allocate(q_desc, k_desc, v_desc, o_desc)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):  # a program may be complete before the producer has asked about the one before
        mbarrier.init(done.index(i), count=CONSUMERS)
    fence_async_shared()

    lists = (order, notes)
    memory = (state, now, key_tiles)
    # What a partition is given takes registers of all partitions: nothing is, where there are no ranges.
    if HAS_RANGES:
        protected = (start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3)
    else:
        protected = (0, 0, 0, 0, 0, 0, 0, 0)
    sizes = (heads, heads_per_kv, q_tiles, q_len, k_tiles)
    extras = (lse, key_bias, biased, q_scales, k_scales)
    gl.warp_specialize(
        [
            (
                consume,
                (0, o_desc, extras, queries, o_smem, turns, done, ring, lists, k_len, qk_scale, limit,
                 False, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS, False),
            ),
            (
                consume,
                (1, o_desc, extras, queries, o_smem, turns, done, ring, lists, k_len, qk_scale, limit,
                 False, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS, False),
            ),
            (
                consume,
                (2, o_desc, extras, queries, o_smem, turns, done, ring, lists, k_len, qk_scale, limit,
                 False, HAS_LSE, HAS_BIAS, QK_BITS, BY_MASS, False),
            ),
            (
                _produce,
                ((q_desc, k_desc, v_desc), extras, queries, ring, lists, done, memory, protected, counter, programs,
                 sizes, k_len, bias_stride, streams, QK_BITS, HAS_KINDS),
            ),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip
