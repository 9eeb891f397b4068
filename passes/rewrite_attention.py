"""Rewrite attention sites to the stateful op, each with its layer's skip state as a new graph input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .. import ops
from ..skip_state import TileShape, state_shape
from .decide_attention import Rewrite
from .graph_inputs import append_input, fake_tensor

Size = int | torch.SymInt


@dataclass(frozen=True)
class StateInput:
    """A state tensor that the compiled graph expects after its own inputs."""

    layer: str
    weight: fx.Node
    tile: TileShape
    q_len: Size
    k_len: Size
    shape: tuple[Size, ...]
    """int32 `[streams, B, H, q_tiles, row_words]`, possibly symbolic."""


def rewrite_attention(
    gm: fx.GraphModule, rewrites: Sequence[Rewrite], now: fx.Node, threshold: float, max_streams: int
) -> list[StateInput]:
    """Replace each site by `lite_compile::attend`; the rest of the graph is untouched."""
    return [_rewrite(gm.graph, number, rewrite, now, threshold, max_streams) for number, rewrite in enumerate(rewrites)]


def _rewrite(
    graph: fx.Graph, number: int, rewrite: Rewrite, now: fx.Node, threshold: float, max_streams: int
) -> StateInput:
    site, tile = rewrite.site, rewrite.kernel.tile
    q, k, out = fake_tensor(site.q), fake_tensor(site.k), fake_tensor(site.node)
    assert q is not None
    assert k is not None
    assert out is not None
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    shape = state_shape(max_streams, batch, heads, q_len, k_len, tile)
    state = append_input(graph, f"lite_state_{number}", q.new_empty(shape, dtype=torch.int32))

    with graph.inserting_before(site.node):
        attend = graph.call_function(
            torch.ops.lite_compile.attend.default,
            (site.q, site.k, site.v, state, now, rewrite.scale, threshold, tile.q, tile.k, _heads_last(out)),
        )
        result = graph.call_function(operator.getitem, (attend, 0))
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in site.node.meta:
            attend.meta[key] = result.meta[key] = site.node.meta[key]
    attend.meta["example_value"] = ops.allocate_outputs(q, q, _heads_last(out), return_lse=False)
    result.meta["example_value"] = out
    site.node.replace_all_uses_with(result)
    graph.erase_node(site.node)
    return StateInput(site.layer, rewrite.weight, tile, q_len, k_len, tuple(shape))


def _heads_last(out: torch.Tensor) -> bool:
    """Whether the dense attention would have laid its output out as `[B, S, H, D]`: code after it may view it so."""
    return not out.is_contiguous()
