"""The stateful attention op `lite_compile::attend`: schema, fake, dispatch and reference, in one torch-only place.

Kernels are imported when a tensor of their device arrives, so importing this file never imports Triton.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .skip_state import (
    COMPUTED_WORD,
    EPOCH_WORD,
    TileShape,
    pack_bits,
    row_layout,
    state_shape,
    tile_count,
    unpack_bits,
)

NOW_EPOCH, NOW_STEP, NOW_SLOT, NOW_GENERATION, NOW_FRACTION = range(5)
NOW_WORDS = 5
LOG2_E = 1.4426950408889634
MAX_PROTECTED = 4
"""Most ranges of protected positions."""
FREE_TILE, COMPUTED_TILE, HIDDEN_TILE = range(3)
"""Kinds of key tiles, see `attend_reference`."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CRITERIA = ("max", "mass")
"""What the threshold is compared with; see `attend_reference`."""

Index = TypeVar("Index", int, Tensor)
Kernel = Callable[..., None]
"""Takes q, k, v, state, now, scale, threshold, tile, out and lse, then what else a kernel of ours takes."""
Watcher = Callable[[Tensor, Tensor, Tensor, Tensor, float, TileShape, Tensor | None], None]

watchers: list[Watcher] = []
"""Called with q, k, state, now, scale, tile and key_bias before attention is computed; see `attention_capture`."""
intercept: Callable[[Kernel], Kernel] | None = None
"""Gives what computes attention in place of a kernel; see `calibration.intercept`. None: nobody asks for it."""

MAX_CHECKED = 1024
_checked: set[Hashable] = set()
"""What `_check` found right before: a check takes the host longer than the rest of a call."""

_library = torch.library.Library("lite_compile", "DEF")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor now, float scale, Tensor threshold, "
    "int tile_q, int tile_k, bool heads_last=True, bool return_lse=False, Tensor? key_bias=None, "
    'SymInt[] protected=[], str kernel_name="triton", str criterion="max", Tensor? key_tiles=None) -> (Tensor, Tensor)'
)


def allocate_outputs(q: Tensor, v: Tensor, heads_last: bool, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Empty `(out, lse)` for `attend`; `heads_last` lays `out` out as `[B, Sq, H, D]` in memory."""
    batch, heads, q_len, _ = q.shape
    dim = v.shape[-1]
    # In one operator: allocating and transposing takes the host four times as long.
    strides = (dim, heads * dim) if heads_last else (q_len * dim, dim)
    out = q.new_empty_strided((batch, heads, q_len, dim), (heads * q_len * dim, *strides, 1))
    # A number costs the host a third less than a tuple of one.
    lse = q.new_empty((batch, heads, q_len) if return_lse else 0, dtype=torch.float32)
    return out, lse


def _check(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, threshold: Tensor, tile_q: int, tile_k: int,
    key_bias: Tensor | None, protected: Sequence[int], criterion: str, key_tiles: Tensor | None,
) -> TileShape:  # fmt: skip
    """Kernels index memory by these shapes, so a wrong one has to end here. Returns the tile size."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, key_bias)):
        raise RuntimeError("lite_compile::attend has no backward; call it under torch.no_grad()")
    kinds = (
        q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device,
        state.shape, state.dtype, state.device, state.is_contiguous(), now.shape, now.dtype, now.device,
        now.is_contiguous(), threshold.shape, threshold.dtype, threshold.device, tile_q, tile_k, criterion,
        None if key_bias is None else (key_bias.shape, key_bias.dtype, key_bias.device),
        None if key_tiles is None else (key_tiles.shape, key_tiles.dtype, key_tiles.device, key_tiles.is_contiguous()),
        *protected,
    )  # fmt: skip
    if kinds not in _checked:
        _check_shapes(q, k, v, state, now, threshold, tile_q, tile_k, key_bias, protected, criterion, key_tiles)
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        _checked.add(kinds)
    return TileShape(tile_q, tile_k)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, threshold: Tensor, tile_q: int, tile_k: int,
    key_bias: Tensor | None, protected: Sequence[int], criterion: str, key_tiles: Tensor | None,
) -> None:  # fmt: skip
    """All that `_check` looks at in shapes, dtypes, devices and numbers."""
    _check_kinds(q, k, v, state, now, threshold, tile_q, tile_k, key_bias, protected, criterion, key_tiles)
    tile = TileShape(tile_q, tile_k)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{shapes}; allowed: no empty dimension")
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}; allowed: [B, H, Sq, D] and twice [B, Hkv, Sk, D], where Hkv divides H")
    expected = state_shape(state.shape[0], q.shape[0], q.shape[1], q.shape[2], k.shape[2], tile)
    if tuple(state.shape) != expected or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype} {tuple(state.shape)}; allowed: contiguous int32 {expected}")
    if now.shape != (NOW_WORDS,) or not now.is_contiguous():
        raise ValueError(f"now is {now.dtype} {tuple(now.shape)}; allowed: contiguous int32 ({NOW_WORDS},)")
    if key_bias is not None and (key_bias.shape[0] not in (1, q.shape[0]) or key_bias.shape[1] != k.shape[2]):
        raise ValueError(f"key_bias is {tuple(key_bias.shape)}; allowed: [B, Sk] or [1, Sk] with {shapes}")
    k_tiles = tile_count(k.shape[2], tile.k)
    if key_tiles is not None and (key_tiles.shape != (k_tiles,) or not key_tiles.is_contiguous()):
        raise ValueError(f"key_tiles is {tuple(key_tiles.shape)}; allowed: contiguous int8 ({k_tiles},)")


def _check_kinds(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, threshold: Tensor, tile_q: int, tile_k: int,
    key_bias: Tensor | None, protected: Sequence[int], criterion: str, key_tiles: Tensor | None,
) -> None:  # fmt: skip
    """What can be said while tracing, when sizes may be symbols."""
    if not (q.dim() == k.dim() == v.dim() == 4 and state.dim() == 5 and now.dim() == 1):
        ranks = ", ".join(
            f"{name} {x.dim()}" for name, x in zip(("q", "k", "v", "state", "now"), (q, k, v, state, now), strict=True)
        )
        raise ValueError(f"dimensions: {ranks}; allowed: 4, 4, 4, 5, 1")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}; allowed: the same one of {DTYPES}")
    if not state.dtype == now.dtype == torch.int32:
        raise ValueError(f"state {state.dtype}, now {now.dtype}; allowed: int32")
    if not q.device == k.device == v.device == state.device == now.device:
        raise ValueError("q, k, v, state and now have to agree in device")
    if key_bias is not None and (key_bias.dim(), key_bias.dtype, key_bias.device) != (2, torch.float32, q.device):
        raise ValueError(
            f"key_bias is {key_bias.dtype} {tuple(key_bias.shape)} on {key_bias.device}; "
            f"allowed: float32 [B, Sk] or [1, Sk] on {q.device}"
        )
    if key_tiles is not None and (key_tiles.dim(), key_tiles.dtype, key_tiles.device) != (1, torch.int8, q.device):
        raise ValueError(
            f"key_tiles is {key_tiles.dtype} {tuple(key_tiles.shape)} on {key_tiles.device}; "
            f"allowed: int8 with one element per key tile on {q.device}"
        )
    if (threshold.dtype, threshold.device) != (torch.float32, q.device) or threshold.numel() != 1:
        raise ValueError(
            f"threshold is {threshold.dtype} {tuple(threshold.shape)} on {threshold.device}; "
            f"allowed: float32 with one element on {q.device}"
        )
    if tile_q <= 0 or tile_k <= 0:
        raise ValueError(f"tile is {tile_q} x {tile_k}; allowed: positive sizes")
    descending = any(statically_known_true(b < a) for a, b in itertools.pairwise((0, *protected)))
    if len(protected) % 2 or len(protected) > 2 * MAX_PROTECTED or descending:
        raise ValueError(
            f"protected is {list(protected)}; allowed: start and end of up to {MAX_PROTECTED} ranges, "
            "sorted, not overlapping, from 0 on"
        )
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}; allowed: {', '.join(map(repr, CRITERIA))}")


@torch.library.register_fake("lite_compile::attend", lib=_library)
def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor,
    tile_q: int, tile_k: int, heads_last: bool = True, return_lse: bool = False, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), kernel_name: str = "triton", criterion: str = "max", key_tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_kinds(q, k, v, state, now, threshold, tile_q, tile_k, key_bias, protected, criterion, key_tiles)
    return allocate_outputs(q, v, heads_last, return_lse)


@torch.library.impl(_library, "attend", "CPU")
def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor,
    tile_q: int, tile_k: int, heads_last: bool = True, return_lse: bool = False, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), kernel_name: str = "triton", criterion: str = "max", key_tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.attend_cpu import attend_cpu

    tile = _check(q, k, v, state, now, threshold, tile_q, tile_k, key_bias, protected, criterion, key_tiles)
    for watch in watchers:
        watch(q, k, state, now, scale, tile, key_bias)
    out, lse = allocate_outputs(q, v, heads_last, return_lse)
    attend = attend_cpu if intercept is None else intercept(attend_cpu)
    logs = lse if return_lse else None
    attend(q, k, v, state, now, scale, threshold, tile, out, logs, key_bias, protected, criterion, key_tiles)
    return out, lse


@torch.library.impl(_library, "attend", "CUDA")
def _attend_cuda(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor,
    tile_q: int, tile_k: int, heads_last: bool = True, return_lse: bool = False, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), kernel_name: str = "triton", criterion: str = "max", key_tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tile = _check(q, k, v, state, now, threshold, tile_q, tile_k, key_bias, protected, criterion, key_tiles)
    attend = _cuda_kernel(kernel_name) if intercept is None else intercept(_cuda_kernel(kernel_name))
    for watch in watchers:
        watch(q, k, state, now, scale, tile, key_bias)
    out, lse = allocate_outputs(q, v, heads_last, return_lse)
    logs = lse if return_lse else None
    options = {"criterion": criterion, "key_tiles": key_tiles}
    attend(q, k, v, state, now, scale, threshold, tile, out, logs, key_bias, protected, **options)
    return out, lse


@functools.cache
def _cuda_kernel(name: str) -> Kernel:
    """`cuda_kernel`, imported once: the statement takes time at each call, too."""
    from .kernels.select_kernel import cuda_kernel

    return cuda_kernel(name)


def usable_threshold(threshold: Tensor) -> float:
    """The value of a one-element tensor on the CPU; NaN, below which nothing lies, if it is positive."""
    value = float(threshold.item())
    return value if value <= 0 else math.nan


def visit_order(k_tiles: int, first: int, anchors: Tensor, skipped: Tensor) -> Tensor:
    """Order in which the key tiles of one row are visited: int64 indices of the tiles that are not skipped.

    The ring of tiles starts at `first` (the diagonal). Tiles in groups that held a row maximum at the previous call
    (`anchors`, bool `[k_tiles]`) come before the others: once they are visited the running maximum has settled, so
    whether another tile is found negligible no longer depends on where it stands.
    """
    ring = (torch.arange(k_tiles) + first) % k_tiles
    ring = ring[~skipped[ring]]
    return torch.cat([ring[anchors[ring]], ring[~anchors[ring]]])


def first_tile(q_tile: Index, q_len: int, k_len: int, tile: TileShape) -> Index:
    """Key tile on the diagonal of query tile `q_tile` (one, or a tensor of them): the one that faces its first row."""
    return (q_tile * tile.q * k_len // q_len) // tile.k


def touched_tiles(tiles: int, size: int, protected: Sequence[int]) -> Tensor:
    """bool `[tiles]`: which tiles of `size` positions hold a position of the ranges `protected`."""
    start = torch.arange(tiles)[:, None] * size
    ranges = torch.tensor(protected, dtype=torch.int64).view(-1, 2)
    return (torch.maximum(start, ranges[:, 0]) < torch.minimum(start + size, ranges[:, 1])).any(1)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor, tile: TileShape,
    key_bias: Tensor | None = None, protected: Sequence[int] = (), criterion: str = "max",
    key_tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `attend` computes, written to be read: one tile of queries after another, in the dtype of `q`.

    Args:
        q: `[B, H, Sq, D]`; k, v: `[B, Hkv, Sk, D]`, where `Hkv` divides `H`: head `h` of q uses head `h // (H // Hkv)`.
        state: int32 `[streams, B, H, q_tiles, row_words]` as `skip_state` lays it out; updated in place.
        now: int32 `[NOW_WORDS]`: epoch (one per generation and guidance stream), step, slot of the stream, generation,
            and the fraction of the trajectory, which kernels do not read (`trajectory.fraction_of`).
            A slot that `state` does not have (-1) means that none may be used: everything is computed and nothing is
            recorded.
        scale: softmax scale.
        threshold: float32, one element, log2 units, <= 0; `-inf` marks nothing but tiles whose scores are all -inf. A
            value that is positive or NaN marks nothing at all.
        tile: tile size the state was made for.
        key_bias: float32 `[B, Sk]` or `[1, Sk]`, added to the scaled scores of all heads and rows: 0 keeps a key, -inf
            removes it.
        protected: `start, end` of up to `MAX_PROTECTED` ranges of positions, which count for queries and for keys:
            sorted, half-open, not overlapping. Key tiles that touch one are always computed, for query tiles that touch
            one all key tiles are.
        criterion: one of `CRITERIA`.
        key_tiles: int8 `[k_tiles]`, the kind of each key tile: `COMPUTED_TILE` is always computed, `HIDDEN_TILE` never,
            protected or not, with or without a slot; their keys are to have a bias of -inf, so that this is exact.

    Returns:
        `(out, lse)`: `[B, H, Sq, D]` and the natural-log sum of exponentials `[B, H, Sq]`. Rows with no key to attend
        to (all skipped, or all scores -inf) are 0 and -inf.

    A tile is marked when it is negligible for each of its rows; never while a row has met nothing but -inf.

    - "max": its maximum is at least `-threshold` below the running maximum which the row held before this tile
      (LiteAttention, arXiv 2511.11062: QK-skip).
    - "mass": its weights are less than `2**threshold / k_tiles` of the sum of all weights which the row has met, this
      tile's included, or are all exactly 0, being those of scores of -inf. So a generation marks at most `2**threshold`
      of each row's softmax, every tile measured when it is marked (docs/guarantee.md).

    Marked tiles are skipped from the next call of the same stream and generation on. Where scores are NaN, or weights
    underflow, a kernel may mark fewer tiles than are marked here; by mass and at thresholds below -60 also more.
    """
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    k_tiles = tile_count(k_len, tile.k)
    layout = row_layout(k_tiles)
    groups = torch.arange(k_tiles) // layout.anchor_group
    epoch, slot = int(now[NOW_EPOCH]), int(now[NOW_SLOT])
    limit = usable_threshold(threshold)
    share = 2.0**limit / k_tiles
    heads_per_kv = heads // k.shape[1]
    bias = k.new_zeros(batch, k_len) if key_bias is None else key_bias.to(k.dtype).expand(batch, k_len)
    q_protected = touched_tiles(tile_count(q_len, tile.q), tile.q, protected)
    kinds = torch.full((k_tiles,), FREE_TILE) if key_tiles is None else key_tiles
    hidden = kinds == HIDDEN_TILE
    k_protected = touched_tiles(k_tiles, tile.k, protected) | (kinds == COMPUTED_TILE)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for b in range(batch):
        for h in range(heads):
            for i in range(tile_count(q_len, tile.q)):
                rows = slice(i * tile.q, min((i + 1) * tile.q, q_len))
                skipped, anchors = torch.zeros(2, k_tiles, dtype=torch.bool)
                row = state[slot, b, h, i] if 0 <= slot < state.shape[0] else None
                if row is not None and int(row[EPOCH_WORD]) == epoch and not q_protected[i]:
                    anchor_bits = unpack_bits(row[layout.anchor_start : layout.mask_start], 32 * layout.anchor_words)
                    anchors = anchor_bits[groups]
                    skipped = unpack_bits(row[layout.mask_start :], k_tiles) & ~k_protected
                skipped = skipped | hidden
                order = visit_order(k_tiles, first_tile(i, q_len, k_len, tile), anchors, skipped)

                running = q.new_full((rows.stop - rows.start,), -torch.inf)
                met = torch.zeros_like(running)  # sum of 2 ** (score - running)
                argmax_tile = torch.zeros(rows.stop - rows.start, dtype=torch.int64)
                marked = skipped.clone()
                scores: list[tuple[slice, Tensor]] = []
                for t in order.tolist():
                    keys = slice(t * tile.k, min((t + 1) * tile.k, k_len))
                    s = (q[b, h, rows] @ k[b, h // heads_per_kv, keys].T * scale + bias[b, keys]) * LOG2_E
                    tile_max = s.amax(dim=1)
                    raised = torch.maximum(running, tile_max)
                    if criterion == "max":
                        negligible = tile_max - running <= limit
                    else:
                        above = torch.where(raised == -torch.inf, 0.0, raised)
                        mass = torch.exp2(s - above[:, None]).sum(1)
                        met = met * torch.exp2(running - above) + mass
                        empty = tile_max - running == -torch.inf  # all its scores are -inf, not all before it
                        negligible = mass < share * met + empty
                    marked[t] = bool(negligible.all())
                    argmax_tile = torch.where(tile_max > running, t, argmax_tile)
                    running = raised
                    scores.append((keys, s))
                shift = torch.where(running == -torch.inf, 0.0, running)
                total, weighted = torch.zeros_like(running), torch.zeros_like(q[b, h, rows])
                for keys, s in scores:
                    weights = torch.exp2(s - shift[:, None])
                    total += weights.sum(1)
                    weighted += weights @ v[b, h // heads_per_kv, keys]
                out[b, h, rows] = weighted / torch.where(total == 0, 1.0, total)[:, None]
                lse[b, h, rows] = (running + torch.log2(total)) / LOG2_E

                if row is not None:
                    raised = torch.zeros(32 * layout.anchor_words, dtype=torch.bool)
                    raised[groups[argmax_tile]] = True
                    row[EPOCH_WORD] = epoch
                    row[COMPUTED_WORD] = order.numel()
                    row[layout.anchor_start : layout.mask_start] = pack_bits(raised, layout.anchor_words)
                    marked &= ~(k_protected | q_protected[i])
                    row[layout.mask_start :] = pack_bits(marked, layout.mask_words)
    return out, lse
