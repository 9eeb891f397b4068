"""The op `lite_compile::dropped_mass`: how much softmax mass a call of `attend` is about to skip, on sampled rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import NOW_EPOCH, NOW_SLOT, NOW_STEP
from .skip_state import EPOCH_WORD, TileShape, row_layout, tile_count, unpack_bits

SAMPLED_ROWS = 16
"""Queries of each head that are looked at per call; others at the next step."""
STRIDE_OF_HEADS, STRIDE_OF_STEPS = 7919, 104729
"""Primes by which the sampled rows of heads and steps are apart."""

_library = torch.library.Library("lite_compile", "FRAGMENT")
_library.define(
    "dropped_mass(Tensor q, Tensor k, Tensor state, Tensor now, float scale, int tile_q, int tile_k, "
    "Tensor? key_bias=None) -> (Tensor, Tensor)"
)


def sampled_rows(heads: int, q_len: int, step: int) -> Tensor:
    """int64 `[heads, SAMPLED_ROWS]`: one query from each of as many equal parts of the sequence, in each head.

    Args:
        heads: of all batch entries together.
    """
    part = tile_count(q_len, SAMPLED_ROWS)
    start = torch.arange(SAMPLED_ROWS) * q_len // SAMPLED_ROWS
    shift = (torch.arange(heads) * STRIDE_OF_HEADS % part + step * STRIDE_OF_STEPS % part) % part
    return (start + shift[:, None]).clamp(max=q_len - 1)


@torch.library.register_fake("lite_compile::dropped_mass", lib=_library)
def _dropped_mass_fake(
    q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile_q: int, tile_k: int,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty((2,), dtype=torch.float32), torch.empty_like(now)


@torch.library.impl(_library, "dropped_mass", "CPU")
def _dropped_mass_cpu(
    q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile_q: int, tile_k: int,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return dropped_mass(q, k, state, now, scale, TileShape(tile_q, tile_k), key_bias), now.clone()


@torch.library.impl(_library, "dropped_mass", "CUDA")
def _dropped_mass_cuda(
    q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile_q: int, tile_k: int,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .kernels.dropped_mass_triton import dropped_mass_triton

    return dropped_mass_triton(q, k, state, now, scale, TileShape(tile_q, tile_k), key_bias), now.clone()


def dropped_mass(
    q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile: TileShape, key_bias: Tensor | None = None
) -> Tensor:
    """Mean and maximum over the sampled rows, float32 `[2]`: the softmax mass, 0 to 1, of the tiles that `state` skips.

    The op returns a copy of `now` as well, for `attend` to take: so nothing can move it behind `attend`, which marks
    more. A compiler that did would have to keep a copy of the state.

    Args:
        q, k, state, now, scale, tile, key_bias: as `attend` takes them. Rows all of whose keys are hidden drop nothing.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads, k_len = k.shape[1], k.shape[2]
    epoch, step, slot = (int(now[word]) for word in (NOW_EPOCH, NOW_STEP, NOW_SLOT))
    if not 0 <= slot < state.shape[0]:
        return torch.zeros(2)
    k_tiles = tile_count(k_len, tile.k)
    rows = sampled_rows(batch * heads, q_len, step).view(batch, heads, SAMPLED_ROWS)
    masses = []
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    for b in range(batch):
        for h in range(heads):  # one after another, so that few scores exist at a time
            row = rows[b, h]
            words = state[slot, b, h, row // tile.q]
            skipped = unpack_bits(words[:, row_layout(k_tiles).mask_start :], k_tiles)
            skipped &= words[:, EPOCH_WORD, None] == epoch
            scores = q[b, h, row].to(dtype) @ k[b, h * kv_heads // heads].to(dtype).mT * scale
            if key_bias is not None:
                scores += key_bias[b % key_bias.shape[0]]
            weights = scores.softmax(-1).nan_to_num(0.0)
            masses.append((weights * skipped.repeat_interleave(tile.k, -1)[:, :k_len]).sum(-1))
    mass = torch.cat(masses)
    return torch.stack([mass.mean(), mass.amax()]).float()
