"""Record what each step computes and drops: histories per rewritten layer as graph inputs, and what writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..density_history import history_shape, probe_shape, record_density, record_dropped
from .graph_inputs import append_input, fake_mode, fake_tensor
from .rewrite_attention import StateInput


def record_history(gm: fx.GraphModule, layers: Sequence[StateInput], now: fx.Node, max_streams: int) -> None:
    """Append a history of density per layer to the graph's inputs, and a node at the end that writes all of them."""
    histories = _append_histories(gm, layers, "lite_history", history_shape(max_streams), torch.int64)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(record_density, (histories, [layer.state for layer in layers], now))


def record_probes(gm: fx.GraphModule, layers: Sequence[StateInput], now: fx.Node, max_streams: int) -> None:
    """The same for what the layers dropped, which their `dropped` nodes measure."""
    histories = _append_histories(gm, layers, "lite_probe", probe_shape(max_streams), torch.float64)
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(record_dropped, (histories, [layer.dropped for layer in layers], now))


def _append_histories(
    gm: fx.GraphModule, layers: Sequence[StateInput], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> list[fx.Node]:
    histories = []
    for number, layer in enumerate(layers):
        state = fake_tensor(layer.state)
        assert state is not None
        with fake_mode(gm):
            fake = torch.empty(shape, dtype=dtype, device=state.device)
        histories.append(append_input(gm.graph, f"{name}_{number}", fake))
    return histories
