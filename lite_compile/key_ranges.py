"""Ranges of keys that are always computed, or never attended to: the options `must_compute` and `must_skip`.

The ranges of a model are one small tensor, an input of its graphs, so that other ranges compile nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import OptionValueError, wrong_type, wrong_value
from .ops import COMPUTED_TILE, FREE_TILE, HIDDEN_TILE
from .skip_state import tile_count

Positions = tuple[int, int | None]
"""Start and end in a sequence, half-open, as in a slice."""

MAX_RANGES = 16
"""Most ranges of one kind, overlapping ones counted once."""
_END = 2**31 - 1
"""Stands for the end of the sequence."""
_LONG = 2**40
"""A sequence so long that positions which count from different sides are far apart."""
_COMPUTED, _SKIPPED = range(2)


class KeyRanges(NamedTuple):
    """What a graph is told about its keys; None: nothing of that kind, now or later."""

    must_compute: tuple[Positions, ...] | None = None
    must_skip: tuple[Positions, ...] | None = None

    @property
    def any(self) -> bool:
        """Whether the graphs read ranges at all."""
        return self != NO_RANGES


NO_RANGES = KeyRanges()


def is_pair(value: Any) -> bool:
    """Whether a value is two integers, or an integer and None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    start, end = (isinstance(bound, int) and not isinstance(bound, bool) for bound in value)
    return start and (end or value[1] is None)


def is_range(pair: Positions) -> bool:
    """Whether a range may hold positions: its start is before its end where both count from the same side."""
    start, end = pair
    if end is None:
        return True
    return start < (-inf if start < 0 <= end else end) or start >= 0 > end


def check_ranges(name: str, value: Any) -> tuple[Positions, ...] | None:
    """The options `must_compute` and `must_skip`: ranges without overlap, as far as that can be told, in order."""
    allowed = (
        f"None, or a list of at most {MAX_RANGES} pairs (start, end) of positions such as [(0, 512)] or "
        "[(-256, None)], with start < end where both count from the same side, and none that counts its start from the "
        "end and its end from the beginning, each less than 2^31 - 1"
    )
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(map(is_pair, value)):
        raise wrong_type(name, value, allowed)
    pairs = [(start, end) for start, end in value]
    if not all(map(is_range, pairs)) or any(abs(bound or 0) >= _END for pair in pairs for bound in pair):
        raise wrong_value(name, value, allowed)
    merged = _merge(pairs)
    if len(merged) > MAX_RANGES:
        raise wrong_value(name, value, allowed)
    return merged


def _merge(pairs: Sequence[Positions]) -> tuple[Positions, ...]:
    """The same positions in fewer ranges. Those that count from different sides meet in some sequences only."""
    from_start = [pair for pair in pairs if pair[0] >= 0 and (pair[1] is None or pair[1] >= 0)]
    from_end = [pair for pair in pairs if pair[0] < 0]
    others = dict.fromkeys(pair for pair in pairs if pair not in from_start and pair not in from_end)
    return (*_merge_numbers(from_start), *others, *_merge_numbers(from_end))


def _merge_numbers(pairs: Sequence[Positions]) -> list[Positions]:
    merged: list[tuple[int, float]] = []
    for start, end in sorted(pairs, key=lambda pair: pair[0]):
        stop = inf if end is None else end
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return [(start, None if stop == inf else int(stop)) for start, stop in merged]


def _resolve(pair: Positions, length: int) -> tuple[int, int]:
    """Start and end in a sequence of that length; what lies beyond it is left out."""
    start, end, _ = slice(*pair).indices(length)
    return start, max(start, end)


def resolve_ranges(ranges: Sequence[Positions], length: int) -> list[tuple[int, int]]:
    """The ranges within a sequence, in order, without those that are empty."""
    found = (_resolve(pair, length) for pair in ranges)
    return sorted((start, end) for start, end in found if start < end)


def check_disjoint(ranges: KeyRanges, length: int = _LONG, where: str = "") -> None:
    """Raise `OptionValueError` if a key must be both computed and skipped, or if no key is left.

    Args:
        length: of the sequence; by default one longer than any.
        where: names what has that length, for the message.
    """
    skipped = resolve_ranges(ranges.must_skip or (), length)
    for start, end in resolve_ranges(ranges.must_compute or (), length):
        for other_start, other_end in skipped:
            if start < other_end and other_start < end:
                raise OptionValueError(
                    f"liteattention options 'must_compute' {list(ranges.must_compute or ())} and 'must_skip' "
                    f"{list(ranges.must_skip or ())} overlap{where}; allowed: ranges without a position in common"
                )
    covered = 0
    for start, end in skipped:
        if start > covered:
            return
        covered = max(covered, end)
    if covered >= length:
        raise OptionValueError(
            f"liteattention option 'must_skip' is {list(ranges.must_skip or ())}, which leaves no key{where}; allowed: "
            "ranges that leave one"
        )


@lru_cache(maxsize=64)
def range_table(ranges: KeyRanges) -> Tensor:
    """int32 `[2, MAX_RANGES, 2]` on the CPU: starts and ends of both kinds, empty ones where there are fewer."""
    rows = [[(start, _END if end is None else end) for start, end in kind or ()] for kind in ranges]
    rows = [[*row, *[(0, 0)] * (MAX_RANGES - len(row))] for row in rows]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device="cpu")  # whatever the default device is


def _holds(table: Tensor, kind: int, position: Tensor, length: int) -> Tensor:
    """bool, shape of `position`: which positions of a sequence lie in a range of that kind."""
    bounds = table[kind]
    # The end of the sequence, and what lies beyond it, is a large number: positions are below the length.
    from_end = (bounds.clamp(max=0) + length).clamp(min=0)
    start, end = torch.where(bounds < 0, from_end, bounds).unbind(1)
    return ((position[..., None] >= start) & (position[..., None] < end)).any(-1)


def find_key_tiles(table: Tensor, k: Tensor, tile_k: int) -> Tensor:
    """int8 `[k_tiles]`: the kinds of the key tiles, as `attend` takes them. In the graph.

    Args:
        table: int32 `[2, MAX_RANGES, 2]`.
        k: `[B, H, Sk, D]`, of which the length counts.
    """
    length, tiles = k.shape[2], tile_count(k.shape[2], tile_k)
    position = torch.arange(tiles, device=table.device)[:, None] * tile_k + torch.arange(tile_k, device=table.device)
    beyond = position >= length
    computed = (_holds(table, _COMPUTED, position, length) & ~beyond).any(1)
    hidden = (_holds(table, _SKIPPED, position, length) | beyond).all(1)
    kinds = torch.where(hidden, HIDDEN_TILE, torch.where(computed, COMPUTED_TILE, FREE_TILE))
    return kinds.to(torch.int8)


def hide_keys(table: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 `[B | 1, Sk]`: `bias` of the keys, or 0, but -inf for those that must be skipped. In the graph."""
    hidden = _holds(table, _SKIPPED, torch.arange(k.shape[2], device=table.device), k.shape[2])[None]
    return torch.where(hidden, -inf, torch.zeros_like(hidden, dtype=torch.float32) if bias is None else bias)
