"""RMS norm and rotary embedding of queries and keys become one op, `lite_compile::normalize_rotate`."""

from __future__ import annotations

import torch
from torch import fx

from .graph_inputs import fake_tensor
from .match_rotary import Rotary, match_rotary
from .planned_nodes import Operand, PlannedNode, emit, plan

LEAST_ELEMENTS = 1 << 24
"""From how many elements of q on the op pays: below, one launch more per layer costs more than memory traffic does."""


def fuse_rotary(gm: fx.GraphModule, least_elements: int = LEAST_ELEMENTS) -> int:
    """Replace each norm with the rotation of its result, where the graph has at least so many elements; how many."""
    from .. import rotary_op  # noqa: F401  (registers normalize_rotate)
    from ..kernels.rotary_triton import is_supported

    emitted: dict[Operand, fx.Node] = {}
    fused = 0
    for norm in list(gm.graph.nodes):
        found = match_rotary(norm)
        if found is None or _is_small(found, least_elements):
            continue
        x = fake_tensor(found.x)
        assert x is not None
        if is_supported(*x.shape[2:]):
            _replace(gm.graph, found, emitted)
            fused += 1
    return fused


def _is_small(found: Rotary, least_elements: int) -> bool:
    """Whether it is known to have fewer elements; a symbolic size is not."""
    x = fake_tensor(found.x)
    assert x is not None
    return isinstance(x.numel(), int) and x.numel() < least_elements


def _replace(graph: fx.Graph, found: Rotary, emitted: dict[Operand, fx.Node]) -> None:
    out = found.out
    rotated: PlannedNode = plan(torch.ops.lite_compile.normalize_rotate.default, *found[2:])
    fake = fake_tensor(out)
    assert fake is not None
    with graph.inserting_before(found.span[-1].next):
        made = emit(graph, rotated if fake.dim() == 4 else plan("flatten", rotated, 2), emitted, like=out)
    out.replace_all_uses_with(made, delete_user_cb=lambda user: user not in found.span)
    for node in reversed(found.span):
        graph.erase_node(node)
