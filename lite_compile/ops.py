"""The stateful attention op `lite_compile::attend`: schema, fake, dispatch and reference, in one torch-only place.

Kernels are imported when a tensor of their device arrives, so importing this file never imports Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

NOW_EPOCH, NOW_STEP, NOW_SLOT, NOW_GENERATION = range(4)
NOW_WORDS = 4
LOG2_E = 1.4426950408889634

_library = torch.library.Library("lite_compile", "DEF")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor now, float scale, float threshold, "
    "int tile_q, int tile_k, bool heads_last=True, bool return_lse=False) -> (Tensor, Tensor)"
)


def allocate_outputs(q: Tensor, v: Tensor, heads_last: bool, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Empty `(out, lse)` for `attend`; `heads_last` lays `out` out as `[B, Sq, H, D]` in memory."""
    batch, heads, q_len, _ = q.shape
    dim = v.shape[-1]
    if heads_last:
        out = q.new_empty((batch, q_len, heads, dim)).transpose(1, 2)
    else:
        out = q.new_empty((batch, heads, q_len, dim))
    lse = q.new_empty((batch, heads, q_len) if return_lse else (0,), dtype=torch.float32)
    return out, lse


def _check(q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, tile: TileShape) -> None:
    """Kernels index memory by these shapes, so a wrong one has to end here."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("lite_compile::attend has no backward; call it under torch.no_grad()")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}; allowed: [B, H, Sq, D] and twice [B, H, Sk, D]")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"{shapes}; allowed: no empty dimension")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device == state.device == now.device):
        raise ValueError("q, k and v have to agree in dtype, and all tensors in device")
    expected = state_shape(state.shape[0], q.shape[0], q.shape[1], q.shape[2], k.shape[2], tile)
    if state.dtype != torch.int32 or tuple(state.shape) != expected or not state.is_contiguous():
        raise ValueError(f"state is {state.dtype} {tuple(state.shape)}; allowed: contiguous int32 {expected}")
    if now.dtype != torch.int32 or now.shape != (NOW_WORDS,) or not now.is_contiguous():
        raise ValueError(f"now is {now.dtype} {tuple(now.shape)}; allowed: contiguous int32 ({NOW_WORDS},)")


@torch.library.register_fake("lite_compile::attend", lib=_library)
def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: float,
    tile_q: int, tile_k: int, heads_last: bool = True, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return allocate_outputs(q, v, heads_last, return_lse)


@torch.library.impl(_library, "attend", "CPU")
def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: float,
    tile_q: int, tile_k: int, heads_last: bool = True, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.attend_cpu import attend_cpu

    tile = TileShape(tile_q, tile_k)
    _check(q, k, v, state, now, tile)
    out, lse = allocate_outputs(q, v, heads_last, return_lse)
    attend_cpu(q, k, v, state, now, scale, threshold, tile, out, lse if return_lse else None)
    return out, lse


@torch.library.impl(_library, "attend", "CUDA")
def _attend_cuda(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: float,
    tile_q: int, tile_k: int, heads_last: bool = True, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.attend_triton import attend_triton

    tile = TileShape(tile_q, tile_k)
    _check(q, k, v, state, now, tile)
    out, lse = allocate_outputs(q, v, heads_last, return_lse)
    attend_triton(q, k, v, state, now, scale, threshold, tile, out, lse if return_lse else None)
    return out, lse


def visit_order(k_tiles: int, first: int, anchors: Tensor, skipped: Tensor) -> Tensor:
    """Order in which the key tiles of one row are visited: int64 indices of the tiles that are not skipped.

    The ring of tiles starts at `first` (the diagonal). Tiles in groups that held a row maximum at the previous call
    (`anchors`, bool `[k_tiles]`) come before the others: once they are visited the running maximum has settled, so
    whether another tile is found negligible no longer depends on where it stands.
    """
    ring = (torch.arange(k_tiles) + first) % k_tiles
    ring = ring[~skipped[ring]]
    return torch.cat([ring[anchors[ring]], ring[~anchors[ring]]])


def first_tile(q_tile: int, q_len: int, k_len: int, tile: TileShape) -> int:
    """Key tile on the diagonal of query tile `q_tile`: the one that faces its first row."""
    return (q_tile * tile.q * k_len // q_len) // tile.k


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: float, tile: TileShape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `attend` computes, written to be read: one tile of queries after another, in the dtype of `q`.

    Args:
        q: `[B, H, Sq, D]`; k, v: `[B, H, Sk, D]`.
        state: int32 `[streams, B, H, q_tiles, row_words]` as `skip_state` lays it out; updated in place.
        now: int32 `[NOW_WORDS]`: epoch (one per generation and guidance stream), step, slot of the stream, generation.
            A slot of -1 means that no state may be used: everything is computed and nothing is recorded.
        scale: softmax scale.
        threshold: log2 units, <= 0; `-inf` never marks.
        tile: tile size the state was made for.

    Returns:
        `(out, lse)`: `[B, H, Sq, D]` and the natural-log sum of exponentials `[B, H, Sq]`.

    A tile is marked when the maximum of each of its rows is at least `-threshold` below the running maximum which the
    row held before this tile (LiteAttention, arXiv 2511.11062: QK-skip). Marked tiles are skipped from the next call of
    the same stream and generation on.
    """
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    k_tiles = tile_count(k_len, tile.k)
    layout = row_layout(k_tiles)
    groups = torch.arange(k_tiles) // layout.anchor_group
    epoch, slot = int(now[NOW_EPOCH]), int(now[NOW_SLOT])
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for b in range(batch):
        for h in range(heads):
            for i in range(tile_count(q_len, tile.q)):
                rows = slice(i * tile.q, min((i + 1) * tile.q, q_len))
                skipped = anchors = torch.zeros(k_tiles, dtype=torch.bool)
                row = state[slot, b, h, i] if slot >= 0 else None
                if row is not None and int(row[EPOCH_WORD]) == epoch:
                    anchor_bits = unpack_bits(row[layout.anchor_start : layout.mask_start], 32 * layout.anchor_words)
                    anchors = anchor_bits[groups]
                    skipped = unpack_bits(row[layout.mask_start :], k_tiles)
                order = visit_order(k_tiles, first_tile(i, q_len, k_len, tile), anchors, skipped)

                running = q.new_full((rows.stop - rows.start,), -torch.inf)
                argmax_tile = torch.zeros(rows.stop - rows.start, dtype=torch.int64)
                marked = skipped.clone()
                scores: list[tuple[slice, Tensor]] = []
                for t in order.tolist():
                    keys = slice(t * tile.k, min((t + 1) * tile.k, k_len))
                    s = (q[b, h, rows] @ k[b, h, keys].T) * (scale * LOG2_E)
                    tile_max = s.amax(dim=1)
                    marked[t] = bool(scores) and bool((tile_max <= running + threshold).all())  # never the first one
                    argmax_tile = torch.where(tile_max > running, t, argmax_tile)
                    running = torch.maximum(running, tile_max)
                    scores.append((keys, s))
                weights = [(keys, torch.exp2(s - running[:, None])) for keys, s in scores]
                total = torch.stack([w.sum(1) for _, w in weights]).sum(0)
                weighted = torch.stack([w @ v[b, h, keys] for keys, w in weights]).sum(0)
                out[b, h, rows] = weighted / total[:, None]
                lse[b, h, rows] = (running + torch.log2(total)) / LOG2_E

                if row is not None:
                    raised = torch.zeros(32 * layout.anchor_words, dtype=torch.bool)
                    raised[groups[argmax_tile]] = True
                    row[EPOCH_WORD] = epoch
                    row[COMPUTED_WORD] = order.numel()
                    row[layout.anchor_start : layout.mask_start] = pack_bits(raised, layout.anchor_words)
                    row[layout.mask_start :] = pack_bits(marked, layout.mask_words)
    return out, lse
