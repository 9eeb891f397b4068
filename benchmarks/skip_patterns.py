"""Masks to impose on an attention call: which share of the tiles is skipped, and where these lie."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_compile.attention_bench import EPOCH
from lite_compile.skip_state import EPOCH_WORD, TileShape, pack_bits, row_layout, state_shape, tile_count

Shape = tuple[int, int, int, int]
"""`(B, H, S, D)`."""
HEAVY, HEAVY_KEEPS = 0.2, 0.95
"""Of an unbalanced mask: share of the rows that keep nearly everything, and how much they keep."""


def scattered(rows: tuple[int, ...], k_tiles: int, skipped: float) -> Tensor:
    """Each row skips the same number of tiles, at random."""
    order = torch.rand(*rows, k_tiles, device="cuda").argsort(-1).argsort(-1)
    return order < min(round(skipped * k_tiles), k_tiles - 1)


def banded(rows: tuple[int, ...], k_tiles: int, skipped: float) -> Tensor:
    """Each row keeps the tiles around its diagonal, on a ring."""
    diagonal = torch.arange(rows[-1], device="cuda")[:, None] * k_tiles // rows[-1]
    distance = (torch.arange(k_tiles, device="cuda") - diagonal).abs()
    distance = torch.minimum(distance, k_tiles - distance)
    order = distance.argsort(stable=True, dim=-1).argsort(-1)
    return (order >= k_tiles - min(round(skipped * k_tiles), k_tiles - 1)).expand(*rows, k_tiles)


def unbalanced(rows: tuple[int, ...], k_tiles: int, skipped: float) -> Tensor:
    """A random fifth of the rows keeps 95 % of its tiles, the others as few as the share asks for."""
    heavy = torch.rand(*rows, 1, device="cuda") < HEAVY
    light = (1 - skipped - HEAVY * HEAVY_KEEPS) / (1 - HEAVY)
    return _by_share(rows, k_tiles, torch.where(heavy, HEAVY_KEEPS, light))


def unbalanced_late(rows: tuple[int, ...], k_tiles: int, skipped: float) -> Tensor:
    """The same, but the rows that keep much are the last ones."""
    number = torch.arange(rows[0] * rows[1] * rows[2], device="cuda").view(*rows, 1)
    light = (1 - skipped - HEAVY * HEAVY_KEEPS) / (1 - HEAVY)
    return _by_share(rows, k_tiles, torch.where(number >= (1 - HEAVY) * number.numel(), HEAVY_KEEPS, light))


def _by_share(rows: tuple[int, ...], k_tiles: int, kept: Tensor) -> Tensor:
    """Each row keeps exactly its share, at random, and at least one tile."""
    order = torch.rand(*rows, k_tiles, device="cuda").argsort(-1).argsort(-1)
    return order >= (kept * k_tiles).round().clamp(1)


PATTERNS = {
    "scattered": scattered,
    "banded": banded,
    "unbalanced": unbalanced,
    "unbalanced, late": unbalanced_late,
}


def impose(shape: Shape, tile: TileShape, pattern: str, skipped: float) -> tuple[Tensor, Tensor]:
    """A state of generation `EPOCH` that skips these tiles, and the tiles: bool `[B, H, q_tiles, k_tiles]`."""
    batch, heads, length, _ = shape
    k_tiles = tile_count(length, tile.k)
    layout = row_layout(k_tiles)
    state = torch.zeros(state_shape(1, batch, heads, length, length, tile), dtype=torch.int32, device="cuda")
    mask = PATTERNS[pattern](tuple(state.shape[1:4]), k_tiles, skipped)
    state[0, ..., EPOCH_WORD] = EPOCH
    state[0, ..., layout.mask_start :] = pack_bits(mask, layout.mask_words)
    return state, mask
