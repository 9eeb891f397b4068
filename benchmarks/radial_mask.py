"""A static mask in the manner of Radial Attention (arXiv 2506.19852), written from the paper.

Taken from it: energy decays with distance in space and time, so a token attends to all of its own frame, and in a frame
at a distance of d frames to a window around its own position that halves each time d doubles: positions k and l
(numbered row by row within their frames) see each other if |k - l| + 1 <= s / 2^floor(log2 max(d, 1)), s tokens per
frame. Every token attends to the first frame (attention sink). Head, layer, step and content have no say. The first
steps are dense.

Simplified: all windows are multiplied by one factor, whichever gives the density that is asked for. A tile is computed
if the factor reaches what its pairs need on average; tiles with a pair of one frame or a key of the first frame always
are. The paper's thinning of frames at distances over s is left out (no video here has so many frames), and so is its
rule that the first block is dense at all steps.
"""

from __future__ import annotations

import torch
from tile_masks import SparseAttention, VideoLayout, attend_tiles, imposed_rows, keep_tiles, score_tiles
from torch import Tensor

from lite_compile.kernels.select_kernel import Kernel
from lite_compile.skip_state import TileShape


def radial_scores(layout: VideoLayout, tile: TileShape, device: torch.device | str = "cpu") -> Tensor:
    """Per tile, the factor on the paper's windows that its pairs need, on average; 0 for what is always computed."""

    def factor(rows: Tensor, keys: Tensor) -> Tensor:
        apart = (rows // layout.positions - keys // layout.positions).abs()
        shift = (rows % layout.positions - keys % layout.positions).abs()
        narrowing = torch.exp2(torch.frexp(apart.clamp(min=1).float()).exponent - 1.0)  # 2^floor(log2(apart)), exactly
        needed = (shift + 1) * narrowing / layout.positions
        return torch.where((apart == 0) | (keys < layout.positions), 0.0, needed)

    return score_tiles(layout.tokens, tile, factor, device)


class RadialAttention(SparseAttention):
    """Self-attention under `radial_scores`, the same mask in all layers and heads."""

    def __init__(
        self, layout: VideoLayout, kernel: Kernel, density: float, dense_steps: int, device: torch.device | str
    ) -> None:
        super().__init__(layout, dense_steps)
        self.kernel = kernel
        self._rows = imposed_rows(keep_tiles(radial_scores(layout, kernel.tile, device), density))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return attend_tiles(q, k, v, self._rows.expand(*q.shape[:2], -1, -1), scale, self.kernel)
