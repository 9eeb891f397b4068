"""Attention on the CPU that skips the key tiles its state marks, in plain torch.

One group of query tiles at a time (`group_tiles`): gather the tiles of K and V that each of them keeps, one batched
GEMM, the maximum of each tile, one softmax, one batched GEMM. `ops.attend_reference` is the specification; the groups
of a job are decided about at once, after their GEMMs.
Jobs are independent and go to Python threads (`run_in_threads`), each of which computes with one thread.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import COMPUTED_TILE, HIDDEN_TILE, first_tile, touched_tiles, usable_threshold
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

SCORES_AT_ONCE = 2**19
"""Most scores in a group of several query tiles: 2 MiB in float32, about what the cache of a core holds."""


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
    protected: Tensor
    """bool `[B, H, q_tiles, k_tiles]`: tiles that no call may skip"""


def plan_visits(
    rows: Tensor, epoch: int, layout: RowLayout, first: Tensor, q_protected: Tensor, k_protected: Tensor, hidden: Tensor
) -> Plan:
    """Decode state `rows` (int32 `[B, H, q_tiles, row_words]`) and order the visits around `first` (`[q_tiles]`).

    Args:
        q_protected, k_protected: bool `[q_tiles]` and `[k_tiles]`: tiles that touch protected positions.
        hidden: bool `[k_tiles]`: tiles that are never computed.
    """
    k_tiles = k_protected.shape[0]
    alive = (rows[..., EPOCH_WORD, None] == epoch) & ~q_protected[:, None]
    tiles = torch.arange(k_tiles)
    protected = (q_protected[:, None] | k_protected).expand(*rows.shape[:3], k_tiles)
    skipped = unpack_bits(rows[..., layout.mask_start :], k_tiles) & alive & ~protected | hidden
    anchor_bits = unpack_bits(rows[..., layout.anchor_start : layout.mask_start], 32 * layout.anchor_words)
    anchors = anchor_bits[..., tiles // layout.anchor_group] & alive
    ring = (tiles - first[:, None]) % k_tiles
    order = ((2 * skipped.long() + (~anchors).long()) * k_tiles + ring).argsort(-1)
    return Plan(skipped, order, ((~skipped).cumsum(-1) - 1).clamp(min=0), (~skipped).sum(-1), protected)


def record_tiles(
    rows: Tensor, maxima: Tensor, masses: Tensor | None, plan: Plan, epoch: int, layout: RowLayout, threshold: float
) -> None:
    """Write marks, anchors, count and epoch of some query tiles into their `rows` (int32 `[q_tiles, row_words]`).

    Args:
        maxima: `[q_tiles, tile_q, n]`: tile maxima of each row over the kept tiles in ascending order, natural units.
        masses: of the same shape: what each tile adds to the row's softmax, if marks go by it; else None.
        plan: plan of these tiles, without the two leading dimensions.
        threshold: log2 units; NaN marks nothing.
    """
    order = plan.order[:, : maxima.shape[-1]]
    place = plan.rank.gather(-1, order).unsqueeze(1).expand_as(maxima)
    visited = maxima.gather(-1, place).permute(2, 0, 1).contiguous()
    before = torch.full_like(visited, -math.inf)
    for visit in range(1, order.shape[1]):  # several times faster than cummax
        torch.maximum(before[visit - 1], visited[visit - 1], out=before[visit])
    # NaN, and no, while a row has met nothing but -inf.
    if masses is None:
        below = visited - before <= threshold * math.log(2)
    else:
        share = 2.0**threshold / plan.skipped.shape[-1]
        mass = masses.gather(-1, place).permute(2, 0, 1)
        below = mass < share * mass.cumsum(0) + (visited - before == -math.inf)
    negligible = below.all(-1).T
    marked = (plan.skipped.scatter(-1, order, negligible) | plan.skipped) & ~plan.protected

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
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor,
    tile: TileShape, out: Tensor, lse: Tensor | None = None, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), criterion: str = "max", key_tiles: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of `q` over the key tiles that `state` does not skip, into `out`; marks tiles for the next call.

    Args:
        q: `[B, H, Sq, D]`; k: `[B, Hkv, Sk, D]`; v: `[B, Hkv, Sk, Dv]`: float64, float32, bfloat16 or float16, any
            strides; `Hkv` divides `H`.
        state: int32 `[streams, B, H, q_tiles, row_words]` as `skip_state` lays it out; updated in place.
        now: int32, first of all epoch, step, slot (none of the state's: compute everything, use and record nothing).
        scale: softmax scale.
        threshold: float32, one element, log2 units, <= 0; `-inf` marks nothing but tiles whose scores are all -inf.
        tile: tile size the state was made for.
        out: `[B, H, Sq, Dv]`, dtype of `q`, any strides; overwritten.
        lse: natural-log sum of exponentials, float32 `[B, H, Sq]`; overwritten when given.
        key_bias: float32 `[B, Sk]` or `[1, Sk]`, added to the scaled scores.
        protected: `start, end` of ranges of positions whose tiles are always computed, as in `ops.attend_reference`.
        criterion: "max" or "mass", as there.
        key_tiles: int8 `[k_tiles]`, the kind of each key tile, as there.
    """
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    q_tiles, k_tiles = tile_count(q_len, tile.q), tile_count(k_len, tile.k)
    layout = row_layout(k_tiles)
    epoch, _, slot = now.tolist()[:3]
    limit = usable_threshold(threshold)
    recording = 0 <= slot < state.shape[0]
    rows = state[slot] if recording else state.new_zeros(batch, heads, q_tiles, layout.words)
    first = first_tile(torch.arange(q_tiles), q_len, k_len, tile)
    q_protected, k_protected = touched_tiles(q_tiles, tile.q, protected), touched_tiles(k_tiles, tile.k, protected)
    hidden = torch.zeros_like(k_protected)
    if key_tiles is not None:
        k_protected, hidden = k_protected | (key_tiles == COMPUTED_TILE), key_tiles == HIDDEN_TILE
    plan = plan_visits(rows, epoch, layout, first, q_protected, k_protected, hidden)
    heads_per_kv = heads // k.shape[1]

    def attend_job(b: int, h: int, groups: Sequence[Tensor]) -> None:
        tiles = torch.cat(list(groups))
        part = Plan(*(field[b, h, tiles] for field in plan))
        logs = None if lse is None else lse[b, h]
        bias = None if key_bias is None else key_bias.expand(batch, -1)[b]
        keys, values = k[b, h // heads_per_kv], v[b, h // heads_per_kv]
        weigh = recording and criterion == "mass"
        maxima, masses = attend_tiles(q[b, h], keys, values, groups, part, scale, tile, out[b, h], logs, bias, weigh)
        if recording:
            recorded = rows[b, h, tiles]
            record_tiles(recorded, maxima, masses, part, epoch, layout, limit)
            rows[b, h, tiles] = recorded

    # Several jobs per thread even out their different densities; each of them has to convert K and V.
    jobs_per_head = max(1, 4 * torch.get_num_threads() // (batch * heads))
    jobs = []
    for b, h in itertools.product(range(batch), range(heads)):
        groups = group_tiles(plan.computed[b, h], tile)
        length = -(-len(groups) // jobs_per_head)
        jobs += [partial(attend_job, b, h, groups[i : i + length]) for i in range(0, len(groups), length)]
    run_in_threads(jobs)


def group_tiles(computed: Tensor, tile: TileShape) -> list[Tensor]:
    """Indices of the query tiles that are computed together, the fullest first; `computed`: key tiles each keeps.

    Small operators leave the threads waiting for the interpreter's lock, so the fewer key tiles are kept, the more
    query tiles share an operator. Groups do not depend on the number of threads, so neither do results.
    """
    descending, order = computed.sort(descending=True, stable=True)
    counts, sizes, start = descending.tolist(), [], 0
    while start < len(counts):
        widest = counts[start]
        fitting = max(1, SCORES_AT_ONCE // (tile.q * tile.k * max(1, widest)))
        # All of a group are padded to its widest.
        sizes.append(sum(8 * count >= 7 * widest for count in counts[start : start + fitting]))
        start += sizes[-1]
    return list(order.split(sizes))


def pad_to_tiles(x: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    """`x` `[rows, D]` as tiles `[tiles + 1, tile * D]`, zeros in place of missing rows, all of the last tile's."""
    length, dim = x.shape
    padded = x.new_empty((tile_count(length, tile) + 1) * tile, dim, dtype=dtype)
    padded[:length] = x
    padded[length:] = 0
    return padded.view(-1, tile * dim)


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Tensor], plan: Plan, scale: float, tile: TileShape,
    out: Tensor, lse: Tensor | None, bias: Tensor | None, weigh: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of some query tiles of one head, into their rows of `out` and `lse`.

    Args:
        q, out: `[Sq, D]`; k, v: `[Sk, D]`; lse: `[Sq]`; bias: `[Sk]`, natural units.
        groups: indices of query tiles, `n` in all, those computed together in one tensor.
        plan: plan of these tiles in this order, without the two leading dimensions.
        weigh: whether masses are asked for.

    Returns:
        `[n, tile_q, widest]`: tile maxima of each row over the kept tiles in ascending order, natural units.
        The same of each tile's share in the row's softmax, or None.
    """
    (q_len, dim), (k_len, v_dim) = q.shape, v.shape
    # A bf16 GEMM gives bf16 scores, too coarse to decide by; for P @ V alone it gains too little to be worth its error.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The missing rows of a ragged last tile repeat its last row, which changes no decision.
    row = (torch.cat(list(groups))[:, None] * tile.q + torch.arange(tile.q)).clamp(max=q_len - 1).flatten()
    queries = (q.index_select(0, row).to(dtype) * scale).view(-1, tile.q, dim)
    keys, values = pad_to_tiles(k, tile.k, dtype), pad_to_tiles(v, tile.k, dtype)
    biases = None if bias is None else pad_to_tiles(bias[:, None], tile.k, dtype)
    k_tiles = keys.shape[0] - 1
    counts = plan.computed.tolist()
    kept = torch.where(plan.skipped, k_tiles, torch.arange(k_tiles)).sort(-1).values  # filled up with the missing tile
    stops = list(itertools.accumulate(map(len, groups)))
    spans = list(zip([0, *stops], stops, strict=False))
    largest = max((stop - start) * counts[start] for start, stop in spans)
    gathered_k, gathered_v = keys.new_empty(largest, keys.shape[1]), values.new_empty(largest, values.shape[1])
    score_buffer = queries.new_empty(largest * tile.q * tile.k)
    weighted = queries.new_empty(len(counts), tile.q, v_dim)
    logs = queries.new_empty(len(counts), tile.q)
    maxima = queries.new_full((len(counts), tile.q, max(1, *counts)), -math.inf)
    masses = torch.zeros_like(maxima) if weigh else None
    for start, stop in spans:
        size, n, fewest = stop - start, counts[start], counts[stop - 1]
        if n == 0:  # only a hand-made state asks for an empty softmax
            continue
        chosen, width = kept[start:stop, :n], n * tile.k
        if fewest == k_tiles:
            group_keys, group_values = keys[:-1], values[:-1]
        else:
            indices = chosen.flatten()
            group_keys = torch.index_select(keys, 0, indices, out=gathered_k[: size * n])
            group_values = torch.index_select(values, 0, indices, out=gathered_v[: size * n])
        scores = score_buffer[: size * tile.q * width].view(size, tile.q, width)
        torch.matmul(queries[start:stop], group_keys.view(-1, width, dim).mT, out=scores)
        if biases is not None:
            scores += biases[chosen].view(size, 1, width)
        if fewest < n or k_len % tile.k:  # missing keys come last, the first of them in the last tile of the fewest
            tail = max(fewest - 1, 0)
            missing = chosen[:, tail:, None] * tile.k + torch.arange(tile.k) >= k_len
            scores[..., tail * tile.k :].masked_fill_(missing.view(size, 1, -1), -math.inf)
        row_maxima = torch.amax(scores.view(size, tile.q, n, tile.k), -1)
        maxima[start:stop, :, :n] = row_maxima
        torch.softmax(scores, -1, out=scores)
        if masses is not None:
            torch.sum(scores.view(size, tile.q, n, tile.k), -1, out=masses[start:stop, :, :n])
        if lse is not None:  # the largest weight of a row is exp(0) / sum
            torch.sub(row_maxima.amax(-1), scores.amax(-1).log(), out=logs[start:stop])
        torch.matmul(scores, group_values.view(-1, width, v_dim), out=weighted[start:stop])
    empty = maxima.amax(-1) == -math.inf
    if empty.any():
        weighted[empty], logs[empty] = 0.0, -math.inf
    out.index_copy_(0, row, weighted.flatten(0, 1).to(out.dtype))
    if lse is not None:
        lse.index_copy_(0, row, logs.flatten().to(lse.dtype))
    return maxima, masses


_threads_in_use = threading.Lock()


def run_in_threads(jobs: Sequence[Callable[[], None]]) -> None:
    """Run independent jobs on as many Python threads as torch has threads, each job computing with one.

    The threads of one torch operator wait for each other at its end. The jobs are made of thousands of small operators,
    which on a busy machine would wait most of the time; whole jobs wait once.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if threads == 1:
        for job in jobs:
            job()
        return
    pending, errors = iter(jobs), []

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                for job in pending:  # taking the next one holds the interpreter's lock
                    job()
        except BaseException as error:
            errors.append(error)

    helpers = [threading.Thread(target=work) for _ in range(min(threads, len(jobs)) - 1)]
    # `set_num_threads` is in part global, so only one caller at a time may change it. A single job needs it as well:
    # a GEMM of several threads may sum in another order.
    with _threads_in_use:
        try:
            torch.set_num_threads(1)
            for helper in helpers:
                helper.start()
            work()
            for helper in helpers:
                helper.join()
        finally:
            torch.set_num_threads(threads)
    if errors:
        raise errors[0]
