"""Tiles of QK^T that a fixed pattern computes, at a density that is asked for, and attention over these alone.

What computes it is `lite_compile::attend` with a skip mask that is imposed, so that tiles, density and time mean the
same for every method that is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lite_compile.attention_bench import EPOCH
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.ops import NOW_EPOCH, NOW_GENERATION, NOW_WORDS
from lite_compile.skip_state import COMPUTED_WORD, EPOCH_WORD, TileShape, pack_bits, row_layout, tile_count

NOTHING_IS_MARKED = float("nan")
"""As a threshold: what is imposed stays as it is."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""Of positions `[n, 1]` and `[1, m]`, how late a growing pattern gets to each pair: float32 `[n, m]`; 0: at once."""


class VideoLayout(NamedTuple):
    """Order of the tokens in self-attention: frame after frame, in each the positions row by row."""

    frames: int
    positions: int
    """Tokens per frame."""

    @property
    def tokens(self) -> int:
        return self.frames * self.positions


def score_tiles(tokens: int, tile: TileShape, distance: Distance, device: torch.device | str = "cpu") -> Tensor:
    """Float32 `[q_tiles, k_tiles]`: the mean `distance` of the pairs of a tile; 0 if one of them is at distance 0."""
    k_tiles = tile_count(tokens, tile.k)
    keys = torch.arange(tokens, device=device)[None]
    padding = k_tiles * tile.k - tokens
    sizes = torch.full((k_tiles,), tile.k, device=device)
    sizes[-1] -= padding
    scores = []
    for start in range(0, tokens, tile.q):
        rows = torch.arange(start, min(start + tile.q, tokens), device=device)[:, None]
        pairs = distance(rows, keys)
        mean = F.pad(pairs.mean(0), (0, padding)).view(k_tiles, tile.k).sum(1) / sizes
        nearest = F.pad(pairs.amin(0), (0, padding), value=torch.inf).view(k_tiles, tile.k).amin(1)
        scores.append(torch.where(nearest == 0, 0.0, mean))
    return torch.stack(scores)


def keep_tiles(scores: Tensor, density: float) -> Tensor:
    """bool `[q_tiles, k_tiles]`: the share `density` of the tiles, nearest first; those at 0 even if they are more."""
    keep = scores == 0
    keep.view(-1)[scores.flatten().argsort(stable=True)[: round(density * keep.numel())]] = True
    return keep


def imposed_rows(keep: Tensor) -> Tensor:
    """int32 `[..., q_tiles, row_words]`: rows of the skip state under which just the tiles `keep` are computed."""
    layout = row_layout(keep.shape[-1])
    rows = torch.zeros(*keep.shape[:-1], layout.words, dtype=torch.int32, device=keep.device)
    rows[..., EPOCH_WORD] = EPOCH
    rows[..., layout.mask_start :] = pack_bits(~keep, layout.mask_words)
    return rows


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Attention over the tiles of `rows`: int32 `[B, H, q_tiles, row_words]` of `imposed_rows`.

    Returns:
        What attention returns, `[B, H, S, D]`, and the share of the tiles that were computed, a float32 scalar.
    """
    now = torch.zeros(NOW_WORDS, dtype=torch.int32, device=q.device)
    now[NOW_EPOCH] = now[NOW_GENERATION] = EPOCH
    threshold = torch.full((), NOTHING_IS_MARKED, device=q.device)
    state = rows[None].clone(memory_format=torch.contiguous_format)
    name = "triton" if kernel.name == "cpu" else kernel.name
    out: Tensor = torch.ops.lite_compile.attend(q, k, v, state, now, scale, threshold, *kernel.tile, kernel_name=name)[
        0
    ]
    return out, state[..., COMPUTED_WORD].float().mean() / tile_count(k.shape[2], kernel.tile.k)


class SparseAttention(TorchFunctionMode):
    """While active, self-attention over a video's tokens is what `attend` makes of it, after some dense steps.

    Args:
        layout: of the tokens; attention over other numbers of tokens, and cross-attention, stay what they are.
        dense_steps: so many steps at the beginning of each generation are dense.
    """

    def __init__(self, layout: VideoLayout, dense_steps: int) -> None:
        super().__init__()
        self.layout, self.dense_steps = layout, dense_steps
        self.step, self._densities = 0, list[Tensor]()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of q, k, v `[B, H, S, D]`, and the share of the tiles that were computed."""
        raise NotImplementedError

    def density(self) -> float:
        """Mean share of the tiles that were computed since the last call of this."""
        mean = float(torch.stack([density.cpu() for density in self._densities]).mean())
        self._densities, self.step = [], 0
        return mean

    def end_step(self, *_: Any) -> dict[str, Any]:
        """A `callback_on_step_end` of diffusers."""
        self.step += 1
        return {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = named["query"], named["key"], named["value"]
        if not q.shape[2] == k.shape[2] == self.layout.tokens:
            return func(*args, **kwargs)
        if named.get("attn_mask") is not None or named.get("is_causal") or named.get("dropout_p"):
            raise ValueError("self-attention with a mask, causal or with dropout: not what is compared here")
        if self.step < self.dense_steps:
            self._densities.append(torch.ones(()))
            return func(*args, **kwargs)
        scale = named.get("scale")
        out, density = self.attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        self._densities.append(density)
        return out


def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel that LiteAttention would use; raises `RuntimeError` if there is none."""
    kernel = select_kernel(device, dtype, head_dim)
    if isinstance(kernel, str):
        raise RuntimeError(f"no kernel on {device}: {kernel}")
    return kernel
