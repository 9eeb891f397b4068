"""Heads sorted into spatial and temporal ones at each step, as Sparse VideoGen does (arXiv 2502.01776); from the paper.

Taken from it: a spatial head attends to its own and near frames, which is a band along the diagonal of QK^T, and to the
first frame; a temporal head attends to the same position in all frames, which becomes a band once tokens are ordered
position after position instead of frame after frame (the layout transformation). Which one a head is, is found anew at
each layer and step: a few rows of queries are computed in full and under both masks, and the mask whose output is
nearer counts. The first steps are dense.

Simplified: both bands have the width that gives the density that is asked for, cut by tiles (nearest tiles first);
temporal heads get no extra first frame, since in their order nearly each tile of keys holds a token of it; there are no
text tokens in this attention; no layer is dense at all steps; the layout is transformed by PyTorch and not by a kernel,
so time says little.
"""

from __future__ import annotations

import torch
from tile_masks import SparseAttention, VideoLayout, attend_tiles, imposed_rows, keep_tiles, score_tiles
from torch import Tensor

from lite_compile.kernels.select_kernel import Kernel
from lite_compile.skip_state import TileShape

SAMPLED_ROWS = 64
"""Queries that a head is judged by."""


def spatial_scores(layout: VideoLayout, tile: TileShape, device: torch.device | str = "cpu") -> Tensor:
    """Distance from the diagonal, in tokens in the model's order; 0 for keys of the first frame."""

    def distance(rows: Tensor, keys: Tensor) -> Tensor:
        return torch.where(keys < layout.positions, 0, (rows - keys).abs()).float()

    return score_tiles(layout.tokens, tile, distance, device)


def temporal_scores(layout: VideoLayout, tile: TileShape, device: torch.device | str = "cpu") -> Tensor:
    """Distance from the diagonal, in tokens ordered position after position."""
    return score_tiles(layout.tokens, tile, lambda rows, keys: (rows - keys).abs().float(), device)


def temporal_order(layout: VideoLayout, device: torch.device | str = "cpu") -> Tensor:
    """int64 `[tokens]`: the tokens position after position, each through all frames."""
    return torch.arange(layout.tokens, device=device).view(layout.frames, layout.positions).T.flatten()


class SparseVideoGen(SparseAttention):
    """Self-attention under a spatial or a temporal mask, by head, batch entry, layer and step.

    Args:
        seed: of the rows that are sampled.
    """

    def __init__(
        self, layout: VideoLayout, kernel: Kernel, density: float, dense_steps: int, device: torch.device | str,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(layout, dense_steps)
        self.kernel, self._order = kernel, temporal_order(layout, device)
        self._inverse = self._order.argsort()
        self._keep = [
            keep_tiles(scores(layout, kernel.tile, device), density) for scores in (spatial_scores, temporal_scores)
        ]
        self._rows = [imposed_rows(keep) for keep in self._keep]
        self._generator = torch.Generator(device).manual_seed(seed)
        self._temporal_shares = list[Tensor]()

    def temporal_share(self) -> float:
        """Mean share of the heads that were found temporal since the last call of this."""
        mean = float(torch.stack(self._temporal_shares).mean())
        self._temporal_shares = []
        return mean

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        temporal = self.find_temporal(q, k, v, scale)[..., None, None]
        self._temporal_shares.append(temporal.float().mean())
        spatial_rows, temporal_rows = self._rows
        q, k, v = (torch.where(temporal, x[:, :, self._order], x) for x in (q, k, v))
        out, density = attend_tiles(q, k, v, torch.where(temporal, temporal_rows, spatial_rows), scale, self.kernel)
        return torch.where(temporal, out[:, :, self._inverse], out), density

    def find_temporal(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """bool `[B, H]`: heads whose output, at sampled rows, the temporal mask changes less than the spatial one."""
        tokens = self.layout.tokens
        sampled = torch.randint(tokens, (SAMPLED_ROWS,), generator=self._generator, device=q.device)
        scores = (q[:, :, sampled].float() @ k.float().transpose(2, 3)) * scale
        full = scores.softmax(-1) @ v.float()
        errors = []
        for keep, places in zip(self._keep, (torch.arange(tokens, device=q.device), self._inverse), strict=True):
            seen = keep[places[sampled] // self.kernel.tile.q][:, places // self.kernel.tile.k]
            masked = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.float()
            errors.append((masked - full).square().mean((2, 3)))
        return errors[1] < errors[0]
