"""Decide how the op's result is brought to where the dense attention's was: same shape, dtype and strides."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import ops
from .attention_site import AttentionSite
from .graph_inputs import fake_tensor, size_hint
from .planned_nodes import planned_result


class OutputPlace(NamedTuple):
    """How code after the attention finds the result as it was."""

    heads_last: bool
    """The op lays its result out as `[B, Sq, H, D]` in memory."""
    contiguous: bool
    """After `site.restore` the result has to be made contiguous."""


def place_output(site: AttentionSite, q: torch.Tensor, out: torch.Tensor) -> OutputPlace | str:
    """The place of the result, or what the spelling's `rewrite` gives instead of what the graph had.

    Args:
        q: fake queries `[B, H, Sq, D]`.
        out: fake value of `site.node`.
    """
    for heads_last in (True, False):  # where both would do, the next projection wants heads last
        result = planned_result(ops.allocate_outputs(q, q, heads_last, return_lse=False)[0])
        restored = fake_tensor(site.restore(result))
        if restored is None or list(map(size_hint, restored.shape)) != list(map(size_hint, out.shape)):
            return f"{_describe(restored)} instead of {_describe(out)}"
        if restored.dtype != out.dtype:
            return f"{_describe(restored)} instead of {_describe(out)}"
        if _strides(restored) == _strides(out):
            return OutputPlace(heads_last, contiguous=False)
    if restored is fake_tensor(result):
        return OutputPlace(not out.is_contiguous(), contiguous=False)
    if out.is_contiguous():
        return OutputPlace(heads_last=False, contiguous=True)
    return f"strides {tuple(out.stride())} cannot be kept"


def _strides(x: torch.Tensor) -> list[int | None]:
    """Strides of the dimensions that have any."""
    return [size_hint(stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size_hint(size) != 1]


def _describe(x: torch.Tensor | None) -> str:
    return "no tensor" if x is None else f"{tuple(x.shape)} {x.dtype}".replace("torch.", "")
