"""How far the output of sparse attention lies from that of dense attention: the metrics of `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

METRICS = {
    "l1": "sum|sparse - dense| / sum|dense|",
    "rmse": "|sparse - dense| / |dense|, of Euclidean norms",
    "cosine": "1 - cosine of the angle between sparse and dense",
}
_ELEMENTS_AT_ONCE = 2**26


def attention_error(sparse: Tensor, dense: Tensor, metric: str) -> float:
    """The error of the batch entry that is worst off; waits for the device.

    Args:
        sparse, dense: `[B, H, S, D]`; sums are taken in float32 over heads, in float64 between them.
        metric: one of `METRICS`.
    """
    sums = torch.stack([_sums(a, b, metric) for a, b in _parts(sparse, dense)]).sum(0)  # [3, B]
    a, b, c = sums.unbind()
    if metric == "l1":
        error = a / b
    elif metric == "rmse":
        error = (a / b).sqrt()
    else:  # 1 - cosine of small angles would be the difference of two numbers that rounding makes equal
        error = (a - (c.sqrt() - b.sqrt()).square()) / (2 * (b * c).sqrt())
        error = torch.where((c == 0) & (b > 0), 1.0, error)
    # Where dense attention is zero, any difference is too much, and none is none.
    error = error.clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(torch.where(b > 0, error, torch.where(a == 0, 0.0, torch.inf)).amax())


def _sums(sparse: Tensor, dense: Tensor, metric: str) -> Tensor:
    """float64 `[3, B]`: absolute values or squares of the difference, of dense and of sparse, summed."""
    x, y = sparse.float().flatten(1), dense.float().flatten(1)
    difference = x - y
    size = torch.abs if metric == "l1" else torch.square
    return torch.stack([size(part).sum(1).double() for part in (difference, y, x)])


def _parts(sparse: Tensor, dense: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some heads at a time, so that copies in float32 stay small."""
    batch, _, length, dim = sparse.shape
    heads = max(1, _ELEMENTS_AT_ONCE // (batch * length * dim))
    yield from zip(sparse.split(heads, 1), dense.split(heads, 1), strict=True)
