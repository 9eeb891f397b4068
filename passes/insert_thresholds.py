"""Insert the thresholds: the table of the model's schedules as a graph input, and one node that reads this call's."""

from __future__ import annotations

import torch
from torch import fx

from ..threshold_table import COLUMNS, read_thresholds
from .graph_inputs import append_input, fake_mode


def insert_thresholds(gm: fx.GraphModule, now: fx.Node, layers: int, device: torch.device) -> fx.Node:
    """Append the table as a graph input. The numbers in it are no part of the graph.

    Returns the node of the thresholds at `now`, float32 `[layers]`.
    """
    with fake_mode(gm):
        fake_table = torch.empty((layers, COLUMNS), dtype=torch.float32, device=device)
        fake_thresholds = torch.empty(layers, dtype=torch.float32, device=device)
    table = append_input(gm.graph, "lite_table", fake_table)
    with gm.graph.inserting_after(table if now.op == "placeholder" else now):
        thresholds = gm.graph.create_node("call_function", read_thresholds, (table, now), name="thresholds")
    thresholds.meta["example_value"] = fake_thresholds
    return thresholds
