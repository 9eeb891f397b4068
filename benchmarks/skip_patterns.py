"""Masks to impose on an attention call: which share of the tiles is skipped, and where these lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_compile.attention_bench import EPOCH
from lite_compile.skip_state import EPOCH_WORD, TileShape, pack_bits, row_layout, state_shape, tile_count

Shape = tuple[int, int, int, int]
"""`(B, H, S, D)`."""
HEAVY, HEAVY_KEEPS = 0.2, 0.95
"""Of an unbalanced mask: share of the rows that keep nearly everything, at most; and how much they keep."""


def scattered(rows: tuple[int, ...], k_tiles: int, skipped: float, device: str = "cuda") -> Tensor:
    """Each row skips the same number of tiles, at random."""
    order = torch.rand(*rows, k_tiles, device=device).argsort(-1).argsort(-1)
    return order < min(round(skipped * k_tiles), k_tiles - 1)


def banded(rows: tuple[int, ...], k_tiles: int, skipped: float, device: str = "cuda") -> Tensor:
    """Each row keeps the tiles around its diagonal, on a ring."""
    diagonal = torch.arange(rows[-1], device=device)[:, None] * k_tiles // rows[-1]
    distance = (torch.arange(k_tiles, device=device) - diagonal).abs()
    distance = torch.minimum(distance, k_tiles - distance)
    order = distance.argsort(stable=True, dim=-1).argsort(-1)
    return (order >= k_tiles - min(round(skipped * k_tiles), k_tiles - 1)).expand(*rows, k_tiles)


def unbalanced(rows: tuple[int, ...], k_tiles: int, skipped: float, device: str = "cuda") -> Tensor:
    """Some rows, drawn at random, keep 95 % of their tiles, the others as few as the share asks for.

    A fifth of the rows, but so few that half of what is kept is left for the others: 12 % at 0.77, 5 % at 0.9.
    """
    ranks = torch.rand(math.prod(rows), device=device).argsort().argsort()
    return _keep_in_some(ranks.view(*rows, 1), k_tiles, skipped)


def unbalanced_late(rows: tuple[int, ...], k_tiles: int, skipped: float, device: str = "cuda") -> Tensor:
    """The same, but the rows that keep much are the last ones: all of the last heads."""
    numbers = torch.arange(math.prod(rows), device=device)
    return _keep_in_some(numbers.view(*rows, 1), k_tiles, skipped)


def _keep_in_some(ranks: Tensor, k_tiles: int, skipped: float) -> Tensor:
    """The rows of the highest ranks keep nearly everything."""
    heavy = min(HEAVY, (1 - skipped) / 2 / HEAVY_KEEPS)
    number = round(heavy * ranks.numel())
    light = (1 - skipped - number / ranks.numel() * HEAVY_KEEPS) / (1 - number / ranks.numel())
    kept = torch.where(ranks >= ranks.numel() - number, HEAVY_KEEPS, light)
    order = torch.rand(*ranks.shape[:-1], k_tiles, device=ranks.device).argsort(-1).argsort(-1)
    return order >= (kept * k_tiles).round().clamp(1)


PATTERNS = {
    "scattered": scattered,
    "banded": banded,
    "unbalanced": unbalanced,
    "unbalanced, late": unbalanced_late,
}


def impose(shape: Shape, tile: TileShape, pattern: str, skipped: float, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """A state of generation `EPOCH` that skips these tiles, and the tiles: bool `[B, H, q_tiles, k_tiles]`."""
    batch, heads, length, _ = shape
    k_tiles = tile_count(length, tile.k)
    layout = row_layout(k_tiles)
    state = torch.zeros(state_shape(1, batch, heads, length, length, tile), dtype=torch.int32, device=device)
    mask = PATTERNS[pattern](tuple(state.shape[1:4]), k_tiles, skipped, device)
    state[0, ..., EPOCH_WORD] = EPOCH
    state[0, ..., layout.mask_start :] = pack_bits(mask, layout.mask_words)
    return state, mask
