"""Protect the positions that the `protect` option names, in every site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..key_ranges import Positions
from .attention_site import AttentionSite, Protection
from .graph_inputs import fake_tensor
from .planned_nodes import plan
from .token_roles import Size, add, at_most, size_of


def protect_positions(sites: Sequence[AttentionSite], positions: Sequence[Positions]) -> list[AttentionSite]:
    """The sites with their `protection`. The graph is not changed."""
    return [replace(site, protection=_protection(site, positions)) for site in sites]


def _protection(site: AttentionSite, positions: Sequence[Positions]) -> Protection:
    q = fake_tensor(site.q)
    if q is None or q.dim() != 4 or not positions:
        return Protection()
    ranges = disjoint_ranges(positions, size_of(site.q, 2))
    return Protection(ranges, "option protect") if ranges else Protection()


def disjoint_ranges(positions: Sequence[Positions], length: Size) -> tuple[tuple[Size, Size], ...]:
    """Half-open ranges within a sequence that together cover the same tokens, in order and without overlap.

    The i-th smallest start and the i-th smallest end belong together: this covers what the given pairs covered. Under
    dynamic shapes, ranges may turn out to be empty.
    """
    starts, ends = [], []
    for start, end in positions:
        starts.append(_clip(start, length))
        ends.append(_larger(starts[-1], length if end is None else _clip(end, length)))
    _sort(starts)
    _sort(ends)
    starts[1:] = [_larger(start, before) for start, before in zip(starts[1:], ends, strict=False)]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if not at_most(end, start))


def _clip(position: int, length: Size) -> Size:
    return _smaller(position, length) if position >= 0 else _larger(add(length, position), 0)


def _sort(sizes: list[Size]) -> None:
    for last in range(len(sizes) - 1, 0, -1):
        for place in range(last):
            pair = sizes[place], sizes[place + 1]
            sizes[place : place + 2] = _smaller(*pair), _larger(*pair)


def _smaller(left: Size, right: Size) -> Size:
    return left if at_most(left, right) else right if at_most(right, left) else plan(torch.sym_min, left, right)


def _larger(left: Size, right: Size) -> Size:
    return right if at_most(left, right) else left if at_most(right, left) else plan(torch.sym_max, left, right)
