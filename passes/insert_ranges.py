"""Insert the ranges of keys that `must_compute` and `must_skip` name: a table as a graph input, and what reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..key_ranges import MAX_RANGES, KeyRanges, find_key_tiles, hide_keys
from ..skip_state import TileShape, tile_count
from .graph_inputs import append_input, fake_mode, fake_tensor


class RangeNodes:
    """Nodes that read the table of ranges, made once for all sites that need the same."""

    def __init__(self, table: fx.Node, hides: bool) -> None:
        self._table, self._hides = table, hides
        self._tiles: dict[tuple[Any, ...], fx.Node] = {}
        self._biases: dict[tuple[Any, ...], fx.Node] = {}

    def arguments(self, graph: fx.Graph, k: fx.Node, tile: TileShape, bias: fx.Node | None) -> dict[str, Any]:
        """What `attend` is told about keys `k` that have this bias otherwise; made at the graph's insertion point."""
        fake = fake_tensor(k)
        assert fake is not None
        length = fake.shape[2]
        size = length if isinstance(length, int) else str(length)
        found = {}
        if self._hides:
            if (size, bias) not in self._biases:
                node = graph.call_function(hide_keys, (self._table, k, bias) if bias is not None else (self._table, k))
                known = None if bias is None else fake_tensor(bias)
                rows = 1 if known is None else known.shape[0]
                node.meta["example_value"] = fake.new_empty((rows, length), dtype=torch.float32)
                self._biases[size, bias] = node
            found["key_bias"] = self._biases[size, bias]
        if (size, tile.k) not in self._tiles:
            node = graph.call_function(find_key_tiles, (self._table, k, tile.k))
            node.meta["example_value"] = fake.new_empty((tile_count(length, tile.k),), dtype=torch.int8)
            self._tiles[size, tile.k] = node
        found["key_tiles"] = self._tiles[size, tile.k]
        return found


def insert_ranges(gm: fx.GraphModule, ranges: KeyRanges, device: torch.device) -> RangeNodes | None:
    """Append the table as a graph input, unless there can be no ranges. The numbers in it are no part of the graph."""
    if not ranges.any:
        return None
    with fake_mode(gm):
        fake_table = torch.empty((2, MAX_RANGES, 2), dtype=torch.int32, device=device)
    return RangeNodes(append_input(gm.graph, "lite_ranges", fake_table), ranges.must_skip is not None)
