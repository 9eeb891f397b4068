"""`flex_attention` without a block mask and without a score modification."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from ..decisions import Reason
from .attention_site import AttentionSite, Declined, Spelling, dead_ends, first_result, other_results_used

_ARGUMENTS = 9
_WHOLE_SEQUENCE = 1 << 30
"""Block size of the mask that `flex_attention` makes when it is given none."""


class _Call(NamedTuple):
    node: fx.Node
    plain_scores: bool
    plain_mask: bool


class FlexAttentionSpelling(Spelling):
    """`[B, H, S, D]` in and out. What `score_mod` and `mask_mod` do is read off their sub-graphs."""

    name = "flex_attention"

    def pattern(self, node: fx.Node) -> AttentionSite | None:
        out = first_result(node) if node.target is torch.ops.higher_order.flex_attention else None
        if out is None or len(node.args) < _ARGUMENTS:
            return None
        q, k, v, score_mod, block_mask, scale, _, score_buffers, mask_buffers = node.args[:_ARGUMENTS]
        plain_scores = _returns_its_first_input(score_mod) and not score_buffers
        plain_mask = _is_no_mask(block_mask) and not mask_buffers
        functions = [n for n in (score_mod, *_nodes(block_mask)) if isinstance(n, fx.Node) and n.op == "get_attr"]
        return AttentionSite(
            out,
            q,
            k,
            v,
            scale=scale,
            inner=(node, *functions, *dead_ends(node)),
            match=_Call(node, plain_scores, plain_mask),
        )

    def check(self, site: AttentionSite) -> Declined | None:
        call: _Call = site.match
        if not call.plain_scores:
            return Declined(Reason.VARIANT, "score_mod")
        if not call.plain_mask:
            return Declined(Reason.MASK, "block_mask")
        if other_results_used(call.node):
            return Declined(Reason.SHARED, "lse or max_scores")
        return None


def _is_no_mask(block_mask: Any) -> bool:
    """Whether this is the mask of one block that `flex_attention` makes itself, over lengths of one, all true."""
    values = _nodes(block_mask)
    if len(values) < 6 or values[:2] != [1, 1] or values[-3:-1] != [_WHOLE_SEQUENCE] * 2:
        return False
    counts, indices, *full = values[2:6]
    if getattr(counts, "target", None) is not torch.ones or getattr(indices, "target", None) is not torch.zeros:
        return False
    output = _output_of(values[-1])
    return full == [None, None] and output is not None and output.target == "new_ones"


def _returns_its_first_input(function: Any) -> bool:
    output = _output_of(function)
    return output is not None and output.op == "placeholder" and output is next(iter(output.graph.nodes))


def _output_of(function: Any) -> fx.Node | None:
    """What the sub-graph that a `get_attr` node stands for returns."""
    module = function.graph.owning_module if isinstance(function, fx.Node) and function.op == "get_attr" else None
    if module is None:
        return None
    body = operator.attrgetter(str(function.target))(module)
    if not isinstance(body, fx.GraphModule):
        return None
    result = body.graph.output_node().args[0]
    if isinstance(result, tuple | list) and len(result) == 1:
        result = result[0]
    return result if isinstance(result, fx.Node) else None


def _nodes(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else []
