"""Record what each step computes: one history per rewritten layer as a graph input, and one node that writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..density_history import history_shape, record_density
from .graph_inputs import append_input, fake_mode, fake_tensor
from .rewrite_attention import StateInput


def record_history(gm: fx.GraphModule, layers: Sequence[StateInput], now: fx.Node, max_streams: int) -> None:
    """Append a history per layer to the graph's inputs, and a node at the end of the graph that writes all of them."""
    histories = []
    for number, layer in enumerate(layers):
        state = fake_tensor(layer.state)
        assert state is not None
        with fake_mode(gm):
            fake = torch.empty(history_shape(max_streams), dtype=torch.int64, device=state.device)
        histories.append(append_input(gm.graph, f"lite_history_{number}", fake))
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(record_density, (histories, [layer.state for layer in layers], now))
