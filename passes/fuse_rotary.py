"""RMS norm and rotary embedding of queries and keys become one op, `lite_compile::normalize_rotate`."""

from __future__ import annotations

import torch
from torch import fx

from .graph_inputs import fake_tensor, is_below
from .match_rotary import Rotary, match_rotary
from .planned_nodes import emit, plan
from .share_tables import SharedTables

LEAST_ELEMENTS = 1 << 24
"""From how many elements of q on the op pays: below, one launch more per layer costs more than memory traffic does."""


def fuse_rotary(gm: fx.GraphModule, device: torch.device, least_elements: int | None = None) -> int:
    """Replace each norm on `device` with the rotation of its result by the op.

    Args:
        least_elements: from how many elements on, `LEAST_ELEMENTS` unless given.

    Returns:
        How many were replaced.
    """
    from .. import rotary_op  # noqa: F401  (registers normalize_rotate; needs Triton)
    from ..kernels.rotary_triton import is_supported

    least = LEAST_ELEMENTS if least_elements is None else least_elements
    tables = SharedTables(gm.graph)
    fused = 0
    for norm in list(gm.graph.nodes):
        found = match_rotary(norm)
        x = None if found is None else fake_tensor(found.x)
        if found is None or x is None or x.device != device or is_below(x.numel(), least):
            continue
        if is_supported(*map(int, x.shape[2:])):  # which are known
            _replace(gm.graph, found._replace(cos=tables.share(found.cos), sin=tables.share(found.sin)))
            fused += 1
    return fused


def _replace(graph: fx.Graph, found: Rotary) -> None:
    out = found.out
    # What torch took for variable becomes a constant here: another number is compiled anew.
    found = found._replace(eps=float(found.eps))
    rotated = plan(torch.ops.lite_compile.normalize_rotate.default, *found[2:])
    fake = fake_tensor(out)
    assert fake is not None
    with graph.inserting_before(found.span[-1].next):
        made = emit(graph, rotated if fake.dim() == 4 else plan("flatten", rotated, 2), {}, like=out)
    out.replace_all_uses_with(made, delete_user_cb=lambda user: user not in found.span)
    for node in reversed(found.span):
        graph.erase_node(node)
