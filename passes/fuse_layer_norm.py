"""Layer norms become ops that also add the residual and apply the modulation: `add_normalize`, `normalize`."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .graph_inputs import fake_tensor, is_below
from .match_layer_norm import LayerNorm, match_layer_norm
from .planned_nodes import PlannedNode, emit, plan

LEAST_ELEMENTS = 1 << 24
"""From how many elements on the ops pay: below, one launch more per norm costs more than memory traffic does."""


def fuse_layer_norm(gm: fx.GraphModule, device: torch.device, least_elements: int | None = None) -> int:
    """Replace each layer norm on `device`, with what surrounds it, by an op.

    Args:
        least_elements: from how many elements on, `LEAST_ELEMENTS` unless given.

    Returns:
        How many were replaced.
    """
    from .. import layer_norm_op  # noqa: F401  (registers add_normalize and normalize; needs Triton)
    from ..kernels.layer_norm_triton import is_supported

    least = LEAST_ELEMENTS if least_elements is None else least_elements
    fused = 0
    for norm in list(gm.graph.nodes):
        found = match_layer_norm(norm)
        x = None if found is None else fake_tensor(found.operands.x)
        if found is None or x is None or x.device != device or is_below(x.numel(), least):
            continue
        if is_supported(int(x.shape[2])):  # which is known
            _replace(gm.graph, found)
            fused += 1
    return fused


def _replace(graph: fx.Graph, found: LayerNorm) -> None:
    # What torch took for variable becomes a constant here: another number is compiled anew.
    operands = found.operands._replace(eps=float(found.operands.eps))
    made: dict[fx.Node, PlannedNode]
    if found.total is None:
        x, _, _, *others = operands
        made = {found.out: plan(torch.ops.lite_compile.normalize.default, x, *others)}
    else:
        both = plan(torch.ops.lite_compile.add_normalize.default, *operands)
        made = {node: plan(operator.getitem, both, number) for number, node in enumerate((found.total, found.out))}
    emitted: dict[object, fx.Node] = {}
    with graph.inserting_before(found.after.next):
        new = {node: emit(graph, planned, emitted, like=found.out) for node, planned in made.items()}
    for node, replacement in new.items():
        node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in found.span)
    for node in reversed(found.span):
        graph.erase_node(node)
