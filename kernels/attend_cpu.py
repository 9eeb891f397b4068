"""Attention on the CPU that skips the key tiles its state marks, in plain torch.

One tile of queries at a time: gather the kept tiles of K and V, one GEMM, the maximum of each tile, one softmax, one
GEMM. `ops.attend_reference` is the specification; the decisions of a whole head are taken at once, after its GEMMs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

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


def cpu_tile(head_dim: int) -> TileShape:
    """Tile size for the CPU: the GEMMs lose a third of their speed at 64 query rows, and gain little above 128."""
    return TileShape(128, 64)


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


def record_head(rows: Tensor, maxima: Tensor, plan: Plan, epoch: int, layout: RowLayout, threshold: float) -> None:
    """Write marks, anchors, count and epoch of one head into its state `rows` (int32 `[q_tiles, row_words]`).

    Args:
        maxima: `[q_tiles, tile_q, n]`: tile maxima of each row over the kept tiles in ascending order, natural units.
        plan: plan of this head, without the two leading dimensions.
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
        now: int32 `[4]`: epoch, step, slot (-1: compute everything, use and record nothing).
        scale: softmax scale.
        threshold: log2 units, <= 0; `-inf` never marks.
        tile: tile size the state was made for.
        out: `[B, H, Sq, Dv]`, dtype of `q`, any strides; overwritten.
        lse: natural-log sum of exponentials, float32 `[B, H, Sq]`; overwritten when given.
    """
    batch, heads, q_len, dim = q.shape
    k_len, v_dim = v.shape[2:]
    q_tiles, k_tiles = tile_count(q_len, tile.q), tile_count(k_len, tile.k)
    padding = k_tiles * tile.k - k_len
    layout = row_layout(k_tiles)
    epoch, _, slot = now.tolist()[:3]
    rows = state[slot] if slot >= 0 else state.new_zeros(batch, heads, q_tiles, layout.words)
    # The diagonal: `ops.first_tile` of every tile of queries.
    first = (torch.arange(q_tiles) * tile.q * k_len // q_len) // tile.k
    plan = plan_visits(rows, epoch, layout, first, k_tiles)

    # A bf16 GEMM gives bf16 scores, too coarse to decide by; for P @ V alone it gains too little to be worth its error.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    threads = torch.get_num_threads()
    queries = q.new_empty(q_len, dim, dtype=dtype)
    keys = q.new_zeros(k_tiles, tile.k * dim, dtype=dtype)
    values = q.new_zeros(k_tiles, tile.k * v_dim, dtype=dtype)
    gathered_k, gathered_v = torch.empty_like(keys), torch.empty_like(values)
    score_buffer = q.new_empty(tile.q * k_tiles * tile.k, dtype=dtype)
    weighted = q.new_empty(q_len, v_dim, dtype=dtype)
    row_logs = q.new_empty(q_len, dtype=dtype)
    query_tiles, weighted_tiles, log_tiles = (torch.split(x, tile.q) for x in (queries, weighted, row_logs))

    for b in range(batch):
        for h in range(heads):
            torch.mul(queries.copy_(q[b, h]), scale, out=queries)
            keys.view(-1, dim)[:k_len] = k[b, h]
            values.view(-1, v_dim)[:k_len] = v[b, h]
            counts = plan.computed[b, h].tolist()
            kept_tiles = torch.split((~plan.skipped[b, h]).nonzero()[:, 1], counts)
            maxima = q.new_full((q_tiles, tile.q, max(1, *counts)), -math.inf, dtype=dtype)
            for i, (kept, n) in enumerate(zip(kept_tiles, counts, strict=True)):
                if n == 0:  # only a hand-made state asks for an empty softmax
                    weighted_tiles[i].fill_(math.nan)
                    log_tiles[i].fill_(math.nan)
                    continue
                height, width = query_tiles[i].shape[0], n * tile.k
                # One batch entry per thread keeps its rows on its core from the first GEMM to the last.
                parts = threads if height % (32 * threads) == 0 else 1
                start, stop = int(kept[0]), int(kept[-1]) + 1
                if stop - start == n:
                    tile_keys, tile_values = keys[start:stop], values[start:stop]
                else:
                    tile_keys = torch.index_select(keys, 0, kept, out=gathered_k[:n])
                    tile_values = torch.index_select(values, 0, kept, out=gathered_v[:n])
                tile_keys = tile_keys.view(width, dim).T.expand(parts, dim, width)
                tile_values = tile_values.view(width, v_dim).expand(parts, width, v_dim)
                scores = score_buffer[: height * width].view(height, width)
                torch.bmm(query_tiles[i].view(parts, -1, dim), tile_keys, out=scores.view(parts, -1, width))
                if padding and stop == k_tiles:
                    scores[:, width - padding :] = -math.inf
                row_maxima = maxima[i, :height, :n]
                torch.amax(scores.view(height, n, tile.k), -1, out=row_maxima)
                torch.softmax(scores, -1, out=scores)
                if lse is not None:  # the largest weight of a row is exp(0) / sum
                    torch.sub(row_maxima.amax(-1), scores.amax(-1).log(), out=log_tiles[i])
                torch.bmm(scores.view(parts, -1, width), tile_values, out=weighted_tiles[i].view(parts, -1, v_dim))
            out[b, h] = weighted
            if lse is not None:
                lse[b, h] = row_logs
            if slot >= 0:
                head = Plan(*(field[b, h] for field in plan))
                # The missing rows of a ragged last tile repeat its last row, which changes no decision.
                maxima[-1, query_tiles[-1].shape[0] :] = maxima[-1, query_tiles[-1].shape[0] - 1].clone()
                record_head(rows[b, h], maxima, head, epoch, layout, threshold * math.log(2))
