"""Layout of the skip state: what one attention layer remembers between denoising steps.

The state of a layer is one contiguous int32 tensor `[streams, batch, heads, q_tiles, row_words]`. Each *row* belongs to
one tile of queries and is read and written by the one program that computes this tile, so no atomics are needed:

| words | content |
|---|---|
| 0 | epoch that wrote the row (one per generation and guidance stream); any other reads the row as empty |
| 1 | number of key tiles computed at the row's last call |
| 2 ... | anchors: one bit per group of key tiles, 1 = the group held a row maximum at the last call |
| ... | skip bits: one bit per key tile, bit `t % 32` of word `t // 32`, 1 = skipped |

Zeros mean "compute everything", so a fresh allocation and a stale epoch are both dense. Anchors only steer the
order in which tiles are visited; they never decide whether one is computed.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

EPOCH_WORD = 0
COMPUTED_WORD = 1
HEADER_WORDS = 2
MAX_ANCHOR_WORDS = 4
"""Cap on anchor words per row: above 128 key tiles, anchors name groups of neighbouring tiles, which bounds memory."""

Size = TypeVar("Size", int, torch.SymInt)


class TileShape(NamedTuple):
    """Size of one tile of QK^T: `q` query rows by `k` key columns."""

    q: int
    k: int


class RowLayout(NamedTuple):
    """Word offsets of one row of the state, for a given number of key tiles."""

    anchor_words: int
    mask_words: int
    anchor_group: int
    """Key tiles per anchor bit."""

    @property
    def anchor_start(self) -> int:
        return HEADER_WORDS

    @property
    def mask_start(self) -> int:
        return HEADER_WORDS + self.anchor_words

    @property
    def words(self) -> int:
        return HEADER_WORDS + self.anchor_words + self.mask_words


def tile_count(length: int, tile: int) -> int:
    """Number of tiles that cover `length` positions, the last one possibly ragged."""
    return (length + tile - 1) // tile


def row_layout(k_tiles: int) -> RowLayout:
    """Layout of a row that covers `k_tiles` key tiles."""
    mask_words = tile_count(k_tiles, 32)
    anchor_words = torch.sym_min(mask_words, MAX_ANCHOR_WORDS)
    return RowLayout(anchor_words, mask_words, tile_count(k_tiles, 32 * anchor_words))


def state_shape(
    streams: int, batch: int, heads: int, q_len: int, k_len: int, tile: TileShape
) -> tuple[int, int, int, int, int]:
    """Shape of the int32 state of one layer for `[batch, heads, q_len | k_len, head_dim]` attention."""
    words = row_layout(tile_count(k_len, tile.k)).words
    return (streams, batch, heads, tile_count(q_len, tile.q), words)


def skipped_tiles(rows: torch.Tensor, epoch: int, k_tiles: int) -> torch.Tensor:
    """bool `[..., k_tiles]`: the tiles that rows `[..., row_words]` of the state skip for a reader of that epoch."""
    mask = unpack_bits(rows[..., row_layout(k_tiles).mask_start :], k_tiles)
    return mask & (rows[..., EPOCH_WORD] == epoch)[..., None]


def unpack_bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """Expand int32 words `[..., w]` into bools `[..., count]`, lowest bit first."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = (words.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :count].bool()


def pack_bits(bits: torch.Tensor, words: int) -> torch.Tensor:
    """Inverse of `unpack_bits`: bools `[..., count]` into int32 words `[..., words]`."""
    padded = torch.zeros(*bits.shape[:-1], words * 32, dtype=torch.int64, device=bits.device)
    padded[..., : bits.shape[-1]] = bits.long()
    weights = torch.ones(32, dtype=torch.int64, device=bits.device) << torch.arange(32, device=bits.device)
    unsigned = (padded.unflatten(-1, (words, 32)) * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)
