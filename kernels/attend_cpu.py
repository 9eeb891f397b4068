"""Attention on the CPU that skips the key tiles its state marks, in plain torch.

One tile of queries at a time: gather the kept tiles of K and V, one GEMM, the maximum of each tile, one softmax, one
GEMM. `ops.attend_reference` is the specification; a run of tiles is decided about at once, after its GEMMs.
Runs are independent and go to Python threads (`run_in_threads`), each of which computes with one thread.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import first_tile
from ..skip_state import (
    COMPUTED_WORD,
    EPOCH_WORD,
    RowLayout,
    TileShape,
    pack_bits,
    row_layout,
    tile_count,
    unpack_bits,
)

CPU_TILE = TileShape(128, 64)
"""Tile size on the CPU: the GEMMs lose a third of their speed at 64 query rows, and gain little above 128."""


class Plan(NamedTuple):
    """Which key tiles each tile of queries computes, and in which order it visits them."""

    skipped: Tensor
    """bool `[B, H, q_tiles, k_tiles]`"""
    order: Tensor
    """int64 `[B, H, q_tiles, k_tiles]`: key tiles in visit order, the skipped ones last"""
    rank: Tensor
    """int64 `[B, H, q_tiles, k_tiles]`: place of each kept tile among the kept ones in ascending order"""
    computed: Tensor
    """int64 `[B, H, q_tiles]`: number of tiles kept"""


def plan_visits(rows: Tensor, epoch: int, layout: RowLayout, first: Tensor, k_tiles: int) -> Plan:
    """Decode state `rows` (int32 `[B, H, q_tiles, row_words]`) and order the visits around `first` (`[q_tiles]`)."""
    alive = rows[..., EPOCH_WORD, None] == epoch
    tiles = torch.arange(k_tiles)
    skipped = unpack_bits(rows[..., layout.mask_start :], k_tiles) & alive
    anchor_bits = unpack_bits(rows[..., layout.anchor_start : layout.mask_start], 32 * layout.anchor_words)
    anchors = anchor_bits[..., tiles // layout.anchor_group] & alive
    ring = (tiles - first[:, None]) % k_tiles
    order = ((2 * skipped.long() + (~anchors).long()) * k_tiles + ring).argsort(-1)
    return Plan(skipped, order, ((~skipped).cumsum(-1) - 1).clamp(min=0), (~skipped).sum(-1))


def record_tiles(rows: Tensor, maxima: Tensor, plan: Plan, epoch: int, layout: RowLayout, threshold: float) -> None:
    """Write marks, anchors, count and epoch of a run of query tiles into its `rows` (int32 `[q_tiles, row_words]`).

    Args:
        maxima: `[q_tiles, tile_q, n]`: tile maxima of each row over the kept tiles in ascending order, natural units.
        plan: plan of these tiles, without the two leading dimensions.
        threshold: natural units.
    """
    order = plan.order[:, : maxima.shape[-1]]
    visited = (
        maxima.gather(-1, plan.rank.gather(-1, order).unsqueeze(1).expand_as(maxima)).permute(2, 0, 1).contiguous()
    )
    before = torch.full_like(visited, -math.inf)
    for place in range(1, order.shape[1]):  # several times faster than cummax
        torch.maximum(before[place - 1], visited[place - 1], out=before[place])
    negligible = (visited <= before + threshold).all(-1).T
    negligible[:, 0] = False  # the first tile is visited before there is a maximum, even if all its scores are -inf
    marked = plan.skipped.scatter(-1, order, negligible) | plan.skipped

    # The place that raised a row's maximum last holds it; a row that nothing raised counts for tile 0.
    places = torch.arange(order.shape[1], dtype=maxima.dtype)[:, None, None]
    last = torch.where(visited > before, places, -1).amax(0).long()
    argmax_tile = order.gather(-1, last.clamp(min=0)).masked_fill(last < 0, 0)
    raised = torch.zeros(rows.shape[0], 32 * layout.anchor_words, dtype=torch.bool)
    raised.scatter_(-1, argmax_tile // layout.anchor_group, True)

    rows[:, EPOCH_WORD] = epoch
    rows[:, COMPUTED_WORD] = plan.computed
    rows[:, layout.anchor_start : layout.mask_start] = pack_bits(raised, layout.anchor_words)
    rows[:, layout.mask_start :] = pack_bits(marked, layout.mask_words)


def attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: float,
    tile: TileShape, out: Tensor, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of `q` over the key tiles that `state` does not skip, into `out`; marks tiles for the next call.

    Args:
        q: `[B, H, Sq, D]`; k: `[B, H, Sk, D]`; v: `[B, H, Sk, Dv]`: float64, float32, bfloat16 or float16, any strides.
        state: int32 `[streams, B, H, q_tiles, row_words]` as `skip_state` lays it out; updated in place.
        now: int32 `[4]`: epoch, step, slot (none of the state's: compute everything, use and record nothing),
            generation.
        scale: softmax scale.
        threshold: log2 units, <= 0; `-inf` never marks.
        tile: tile size the state was made for.
        out: `[B, H, Sq, Dv]`, dtype of `q`, any strides; overwritten.
        lse: natural-log sum of exponentials, float32 `[B, H, Sq]`; overwritten when given.
    """
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    q_tiles, k_tiles = tile_count(q_len, tile.q), tile_count(k_len, tile.k)
    layout = row_layout(k_tiles)
    epoch, _, slot = now.tolist()[:3]
    recording = 0 <= slot < state.shape[0]
    rows = state[slot] if recording else state.new_zeros(batch, heads, q_tiles, layout.words)
    plan = plan_visits(rows, epoch, layout, first_tile(torch.arange(q_tiles), q_len, k_len, tile), k_tiles)

    def attend_run(b: int, h: int, tiles: range) -> None:
        inside = slice(tiles.start * tile.q, min(tiles.stop * tile.q, q_len))
        run = Plan(*(field[b, h, tiles.start : tiles.stop] for field in plan))
        logs = None if lse is None else lse[b, h, inside]
        maxima = attend_tiles(q[b, h, inside], k[b, h], v[b, h], run, scale, tile, out[b, h, inside], logs)
        if recording:
            record_tiles(rows[b, h, tiles.start : tiles.stop], maxima, run, epoch, layout, threshold * math.log(2))

    # Several runs per thread even out their different densities.
    length = max(1, min(q_tiles, batch * heads * q_tiles // (4 * torch.get_num_threads())))
    runs = [range(start, min(start + length, q_tiles)) for start in range(0, q_tiles, length)]
    run_in_threads([partial(attend_run, b, h, tiles) for b in range(batch) for h in range(heads) for tiles in runs])


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, tile: TileShape, out: Tensor, lse: Tensor | None
) -> Tensor:
    """Attention of a run of query tiles of one head, into `out` and `lse`.

    Args:
        q, out: `[rows, D]`; k, v: `[Sk, D]`; lse: `[rows]`.
        plan: plan of these tiles, without the two leading dimensions.

    Returns:
        `[q_tiles, tile_q, n]`: tile maxima of each row over the kept tiles in ascending order, natural units.
    """
    (q_len, dim), (k_len, v_dim) = q.shape, v.shape
    k_tiles = plan.skipped.shape[-1]
    padding = k_tiles * tile.k - k_len
    # A bf16 GEMM gives bf16 scores, too coarse to decide by; for P @ V alone it gains too little to be worth its error.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(dtype) * scale
    keys = q.new_zeros(k_tiles, tile.k * dim, dtype=dtype)
    values = q.new_zeros(k_tiles, tile.k * v_dim, dtype=dtype)
    keys.view(-1, dim)[:k_len] = k
    values.view(-1, v_dim)[:k_len] = v
    gathered_k, gathered_v = torch.empty_like(keys), torch.empty_like(values)
    counts = plan.computed.tolist()
    widest = max(1, *counts)
    score_buffer = q.new_empty(tile.q * widest * tile.k, dtype=dtype)
    weighted = q.new_empty(q_len, v_dim, dtype=dtype)
    logs = q.new_empty(q_len, dtype=dtype)
    maxima = q.new_full((len(counts), tile.q, widest), -math.inf, dtype=dtype)
    kept_tiles = torch.split((~plan.skipped).nonzero()[:, 1], counts)
    query_tiles, weighted_tiles, log_tiles = (torch.split(x, tile.q) for x in (queries, weighted, logs))
    for i, (kept, n) in enumerate(zip(kept_tiles, counts, strict=True)):
        if n == 0:  # only a hand-made state asks for an empty softmax
            continue
        height, width = query_tiles[i].shape[0], n * tile.k
        start, stop = int(kept[0]), int(kept[-1]) + 1
        if stop - start == n:
            tile_keys, tile_values = keys[start:stop], values[start:stop]
        else:
            tile_keys = torch.index_select(keys, 0, kept, out=gathered_k[:n])
            tile_values = torch.index_select(values, 0, kept, out=gathered_v[:n])
        scores = score_buffer[: height * width].view(height, width)
        torch.mm(query_tiles[i], tile_keys.view(width, dim).T, out=scores)
        if padding and stop == k_tiles:
            scores[:, width - padding :] = -math.inf
        row_maxima = maxima[i, :height, :n]
        torch.amax(scores.view(height, n, tile.k), -1, out=row_maxima)
        torch.softmax(scores, -1, out=scores)
        if lse is not None:  # the largest weight of a row is exp(0) / sum
            torch.sub(row_maxima.amax(-1), scores.amax(-1).log(), out=log_tiles[i])
        torch.mm(scores, tile_values.view(width, v_dim), out=weighted_tiles[i])
    empty = (maxima.amax(-1) == -math.inf).flatten()[:q_len]
    if empty.any():
        weighted[empty], logs[empty] = 0.0, -math.inf
    out.copy_(weighted)
    if lse is not None:
        lse.copy_(logs)
    # The missing rows of a ragged last tile repeat its last row, which changes no decision.
    last = query_tiles[-1].shape[0]
    maxima[-1, last:] = maxima[-1, last - 1].clone()
    return maxima


_threads_in_use = threading.Lock()


def run_in_threads(jobs: Sequence[Callable[[], None]]) -> None:
    """Run independent jobs on as many Python threads as torch has threads, each job computing with one.

    The threads of one torch operator wait for each other at its end. The jobs are made of thousands of small operators,
    which on a busy machine would wait most of the time; whole jobs wait once.
    """
    count = min(torch.get_num_threads(), len(jobs))
    # `set_num_threads` is in part global, so only one caller at a time may change it; another one does without.
    if count == 1 or not _threads_in_use.acquire(blocking=False):
        for job in jobs:
            job()
        return
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    pending, errors = iter(jobs), []

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                for job in pending:  # taking the next one holds the interpreter's lock
                    job()
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=work) for _ in range(count - 1)]
    try:
        torch.set_num_threads(1)
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
    finally:
        torch.set_num_threads(threads)
        _threads_in_use.release()
    if errors:
        raise errors[0]
