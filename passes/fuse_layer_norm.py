"""Layer norms become ops that also add the residual and apply the modulation: `add_normalize`, `normalize`."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .graph_inputs import fake_tensor
from .match_layer_norm import LayerNorm, match_layer_norm
from .planned_nodes import PlannedNode, emit, plan

LEAST_ELEMENTS = 1 << 24
"""From how many elements on the ops pay: below, one launch more per norm costs more than memory traffic does."""


def fuse_layer_norm(gm: fx.GraphModule, least_elements: int = LEAST_ELEMENTS) -> int:
    """Replace each layer norm of at least so many elements, with what surrounds it; how many."""
    from .. import layer_norm_op  # noqa: F401  (registers add_normalize and normalize)
    from ..kernels.layer_norm_triton import is_supported

    fused = 0
    for norm in list(gm.graph.nodes):
        found = match_layer_norm(norm)
        if found is None:
            continue
        x = fake_tensor(found.operands.x)
        assert x is not None
        if (isinstance(x.numel(), int) and x.numel() < least_elements) or not is_supported(x.shape[2]):
            continue
        _replace(gm.graph, found)
        fused += 1
    return fused


def _replace(graph: fx.Graph, found: LayerNorm) -> None:
    made: dict[fx.Node, PlannedNode]
    if found.total is None:
        x, _, _, *others = found.operands
        made = {found.out: plan(torch.ops.lite_compile.normalize.default, x, *others)}
    else:
        both = plan(torch.ops.lite_compile.add_normalize.default, *found.operands)
        made = {node: plan(operator.getitem, both, number) for number, node in enumerate((found.total, found.out))}
    emitted: dict[object, fx.Node] = {}
    with graph.inserting_before(found.after.next):
        new = {node: emit(graph, planned, emitted, like=found.out) for node, planned in made.items()}
    for node, replacement in new.items():
        node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in found.span)
    for node in reversed(found.span):
        graph.erase_node(node)
