"""Rewrite attention sites to the stateful op, each with its layer's skip state as a new graph input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx

from .. import ops
from ..skip_state import TileShape, state_shape
from .attention_site import AttentionSite
from .decide_attention import Rewrite
from .graph_inputs import append_input, fake_tensor, fake_value
from .insert_ranges import RangeNodes
from .planned_nodes import Operand, copy_origin, emit, plan

Size = int | torch.SymInt


@dataclass(frozen=True)
class StateInput:
    """A state tensor that the compiled graph expects after its own inputs."""

    layer: str
    weight: fx.Node
    state: fx.Node
    tile: TileShape
    q_len: Size
    k_len: Size
    shape: tuple[Size, ...]
    """int32 `[streams, B, H, q_tiles, row_words]`, possibly symbolic."""
    dropped: fx.Node | None = None
    """With `probe`: float32 `[2]`, mean and maximum of the softmax mass that sampled rows lose."""


def rewrite_attention(
    gm: fx.GraphModule, rewrites: Sequence[Rewrite], now: fx.Node, thresholds: fx.Node, max_streams: int,
    criterion: str = "max", ranges: RangeNodes | None = None, probe: bool = False,
) -> list[StateInput]:  # fmt: skip
    """Replace each site by `lite_compile::attend`; the rest of the graph is untouched.

    Args:
        now: int32 `[NOW_WORDS]`: where the call stands.
        thresholds: float32 `[len(rewrites)]`: one for each site, in log2 units.
        criterion: what they are compared with, one of `ops.CRITERIA`.
        ranges: makes what the op is told about ranges of keys; None: there are none.
        probe: measure what each site drops as well.
    """
    emitted: dict[Operand, fx.Node] = {}
    return [
        _rewrite(gm.graph, number, rewrite, now, thresholds, max_streams, criterion, emitted, ranges, probe)
        for number, rewrite in enumerate(rewrites)
    ]


def _rewrite(
    graph: fx.Graph, number: int, rewrite: Rewrite, now: fx.Node, thresholds: fx.Node, max_streams: int,
    criterion: str, emitted: dict[Operand, fx.Node], ranges: RangeNodes | None, probe: bool,
) -> StateInput:  # fmt: skip
    site, tile, place = rewrite.site, rewrite.kernel.tile, rewrite.place
    q, k, out = fake_tensor(site.q), fake_tensor(site.k), fake_tensor(site.node)
    assert q is not None
    assert k is not None
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    shape = state_shape(max_streams, batch, heads, q_len, k_len, tile)
    state = append_input(graph, f"lite_state_{number}", q.new_empty(shape, dtype=torch.int32))

    with graph.inserting_before(site.node):
        operands = emit(graph, (site.q, site.k, site.v), emitted, like=site.origin)
        threshold = graph.create_node(
            "call_function", operator.getitem, (thresholds, number), name=f"threshold_{number}"
        )
        optional = emit(graph, _optional_arguments(rewrite, criterion), emitted, like=site.origin)
        if ranges is not None:
            optional |= ranges.arguments(graph, operands[1], tile, optional.get("key_bias"))
        dropped = None
        if probe:
            bias = {"key_bias": optional["key_bias"]} if "key_bias" in optional else {}
            arguments = (*operands[:2], state, now, rewrite.scale, tile.q, tile.k)
            probed = graph.call_function(torch.ops.lite_compile.dropped_mass.default, arguments, bias)
            probed.meta["example_value"] = (q.new_empty((2,), dtype=torch.float32), fake_value(now))
            dropped, now = (graph.call_function(operator.getitem, (probed, index)) for index in (0, 1))
            for index, node in enumerate((dropped, now)):
                node.meta["example_value"] = probed.meta["example_value"][index]
            copy_origin(site.origin, probed)
        attend = graph.call_function(
            torch.ops.lite_compile.attend.default,
            (*operands, state, now, rewrite.scale, threshold, tile.q, tile.k, place.heads_last),
            optional,
        )
        result = graph.call_function(operator.getitem, (attend, 0))
        copy_origin(site.origin, threshold)
        copy_origin(site.origin, attend)
        copy_origin(site.origin, result)
        threshold.meta["example_value"] = q.new_empty((), dtype=torch.float32)
        attend.meta["example_value"] = ops.allocate_outputs(q, q, place.heads_last, return_lse=False)
        result.meta["example_value"] = attend.meta["example_value"][0]
        restored = emit(graph, _restore(site, result, place.contiguous), emitted, like=site.origin)
    restored.meta["example_value"] = out
    site.node.replace_all_uses_with(restored)
    emitted[site.node] = restored
    _erase(graph, site)
    return StateInput(site.layer, rewrite.weight, state, tile, q_len, k_len, tuple(shape), dropped)


def _optional_arguments(rewrite: Rewrite, criterion: str) -> dict[str, Any]:
    """Those of the op's arguments that are not what the op takes without being told."""
    given = {
        "key_bias": rewrite.key_bias,
        "protected": [*chain(*rewrite.protection.ranges)] or None,
        "kernel_name": None if rewrite.device.type == "cpu" else rewrite.kernel.name,
        "criterion": None if criterion == "max" else criterion,
    }
    return {name: value for name, value in given.items() if value is not None}


def _restore(site: AttentionSite, result: fx.Node, contiguous: bool) -> Operand:
    restored = site.restore(result)
    return plan("contiguous", restored) if contiguous else restored


def _erase(graph: fx.Graph, site: AttentionSite) -> None:
    """Take out the dense attention, as far as nothing else uses it."""
    graph.erase_node(site.node)
    left = {*site.inner, *site.copies}
    while unused := [node for node in left if not node.users]:
        for node in unused:
            graph.erase_node(node)
        left.difference_update(unused)
