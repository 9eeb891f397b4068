"""Does sparsity last? Tiles that are negligible at one step, looked at again at later ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from moving_digits.pipeline import Setting
from moving_digits.sampling import SHOWN_PROMPTS, THRESHOLDS, Sampling, generate, mean

TILE_Q = TILE_K = 128
LOG2_E = 1.4426950408889634


def measure_coherence(pipe: WanPipeline, setting: Setting, how: Sampling) -> dict[str, Any]:
    """Of the tiles that an oracle would mark at step t, the share that it would still mark 1, 5, ... steps later.

    The oracle knows the final maximum of each row. Dense trajectory, one seed per prompt, every layer and both streams.
    """
    if setting.tokens % TILE_Q:
        raise SystemExit(f"evaluate: {setting.tokens} tokens are no multiple of {TILE_Q}")
    kept: dict[str, dict[str, list[float]]] = {str(t): {"1": [], "5": [], "last": []} for t in THRESHOLDS}
    marked: dict[str, list[list[float]]] = {str(t): [] for t in THRESHOLDS}
    for number, prompt in enumerate(tqdm(SHOWN_PROMPTS, desc="dense", unit="video")):
        with GapRecorder(setting.tokens) as recorder:
            generate(pipe, setting, [prompt], how.seed + number, how.steps, how.guidance)
        gaps = torch.stack(recorder.gaps).unflatten(0, (how.steps, -1))
        for threshold in THRESHOLDS:
            negligible = gaps >= max(-threshold, 1e-6)  # the tile that holds a row's maximum is never marked
            marked[str(threshold)].append(negligible.float().flatten(1).mean(1).tolist())
            for lag, values in kept[str(threshold)].items():
                values += list(_kept(negligible, lag))
    return {
        "tile": [TILE_Q, TILE_K],
        "kept": {t: {lag: mean(v) if v else None for lag, v in lags.items()} for t, lags in kept.items()},
        "marked_per_step": {t: torch.tensor(v).mean(0).tolist() for t, v in marked.items()},
    }


def _kept(negligible: Tensor, lag: str) -> Iterator[float]:
    """Per step, the share of its negligible tiles that are negligible `lag` steps later as well."""
    steps = len(negligible)
    for step in range(steps - 1):
        later = steps - 1 if lag == "last" else step + int(lag)
        if later < steps and negligible[step].any():
            yield float((negligible[step] & negligible[later]).sum() / negligible[step].sum())


class GapRecorder(TorchFunctionMode):
    """While active, keeps for each self-attention how far each tile lies below the final maxima of its rows.

    `gaps` holds one float16 `[heads, q_tiles, k_tiles]` per call, log2 units: the least distance over the tile's rows.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.gaps = tokens, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args, strict=False)) | kwargs
            q, k = named["query"], named["key"]
            if q.shape[2] == k.shape[2] == self.tokens:
                self.gaps.append(tile_gaps(q[0], k[0]))
        return func(*args, **kwargs)


def tile_gaps(q: Tensor, k: Tensor) -> Tensor:
    """`GapRecorder.gaps` of q and k `[heads, tokens, head_dim]`, a multiple of the tile."""
    scores = (q.float() @ k.float().transpose(1, 2)) * (q.shape[-1] ** -0.5 * LOG2_E)
    maxima = scores.unflatten(2, (-1, TILE_K)).amax(3)
    below = maxima.amax(2, keepdim=True) - maxima
    rows: Tensor = below.unflatten(1, (-1, TILE_Q))
    return rows.amin(2).half().cpu()
