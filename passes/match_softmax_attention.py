"""Attention written out: `softmax(scale * q @ k^T) @ v`, found from its softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from ..decisions import Reason
from .attention_site import AttentionSite, Declined, Spelling
from .graph_inputs import fake_tensor
from .label_attention import label_attention
from .planned_nodes import Operand, plan
from .pointwise_steps import FLOATS, cast_of
from .trace_operand import Origin, choose_origin, loses_nothing, trace_operand
from .walk_softmax import walk_down, walk_up
from .writes import written_meanwhile

_SOFTMAX = {
    torch.softmax, F.softmax, "softmax", torch.special.softmax,
    torch.ops.aten._softmax, torch.ops.aten._softmax.default, torch.ops.aten.softmax, torch.ops.aten.softmax.int,
}  # fmt: skip


class _Written(NamedTuple):
    """How the attention was written."""

    out_dims: tuple[int, ...]
    """The permutation from `[batch..., tokens, head dim]` to the result."""
    span: tuple[fx.Node, ...]
    """What computes the attention, between reading q, k and v and the result."""
    declined: Declined | None


class SoftmaxSpelling(Spelling):
    """Products by matmul, bmm, baddbmm or einsum; `[B, H, S, D]` in any order of dimensions, or heads in the batch."""

    name = "softmax attention"

    def pattern(self, node: fx.Node) -> AttentionSite | None:
        if node.target not in _SOFTMAX or not _over_last_dim(node):
            return None
        scores = walk_up(node)
        weights = walk_down(node)
        if scores is None or weights is None:
            return None
        viewed = scores.viewed or weights.viewed
        roles = label_attention(scores.product, weights.product, weights.node, viewed)
        if roles is None:
            return None
        declined = scores.declined or weights.declined
        if scores.mask is not None and not scores.product.rows_before_keys:
            declined = declined or Declined(
                Reason.MASK, "it is added to scores whose last dimensions are no rows and keys"
            )
        span = [node, *scores.passed, *weights.passed]
        out = weights.product.node
        if isinstance(roles, Declined):
            product = scores.product
            written = _Written((), (), declined or roles)
            return AttentionSite(out, product.left, product.right, None, inner=(node,), match=written)
        operands = (
            trace_operand(roles.q, roles.q_dims, scores.product.node, scaled=True),
            trace_operand(roles.k, roles.k_dims, scores.product.node, scaled=True),
            trace_operand(roles.v, roles.v_dims, weights.product.node, scaled=False),
        )
        out, chosen = _choose(out, operands)
        scale = scores.scale
        if not isinstance(scale, fx.Node):
            scale = scale * chosen[0].factor * chosen[1].factor
        q, k, v = (_four_dimensional(origin.planned()) for origin in chosen)
        span += [passed for origin in chosen for passed in origin.passed]
        span += [] if out is weights.product.node else [weights.product.node]
        return AttentionSite(
            out, q, k, v,
            attn_mask=scores.mask,
            scale=scale,
            dropout_p=weights.dropout_p,
            inner=tuple(dict.fromkeys((*span, *scores.terms))) if declined is None else (node,),
            match=_Written(roles.out_dims, tuple(span), declined),
        )  # fmt: skip

    def check(self, site: AttentionSite) -> Declined | None:
        written: _Written = site.match
        if written.declined is not None:
            return written.declined
        changed = written_meanwhile(written.span, site.node)
        return None if changed is None else Declined(Reason.VARIANT, f"{changed.name} writes in place meanwhile")

    def rewrite(self, site: AttentionSite, out: Operand) -> Operand:
        dims = site.match.out_dims
        for _ in range(4 - len(dims)):
            out = plan("squeeze", out, 0)
        return out if dims == tuple(range(len(dims))) else plan("permute", out, *dims)


def _over_last_dim(node: fx.Node) -> bool:
    """Whether a softmax of floats runs over the last dimension."""
    fake = fake_tensor(node)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return fake is not None and fake.dtype in FLOATS and isinstance(dim, int) and dim in (-1, fake.dim() - 1)


def _choose(out: fx.Node, operands: tuple[list[Origin], ...]) -> tuple[fx.Node, list[Origin]]:
    """Where to take q, k and v from, all in one dtype: that of the result, or that of a narrowing cast after it."""
    results = [out]
    user = next(iter(out.users), None)
    if len(out.users) == 1 and user is not None and cast_of(user) is out and loses_nothing(user, out):
        results.insert(0, user)
    for result in results:
        fake = fake_tensor(result)
        chosen = [] if fake is None else [choose_origin(origins, fake.dtype) for origins in operands]
        if chosen and all(origin is not None for origin in chosen):
            return result, [origin for origin in chosen if origin is not None]
    return out, [origins[0] for origins in operands]


def _four_dimensional(x: Operand) -> Operand:
    """`[B, H, S, D]` of `[heads, S, D]` or `[S, D]`: heads that are folded into the batch may as well be heads."""
    rank = getattr(fake_tensor(x), "ndim", 4)
    for _ in range(4 - rank):
        x = plan("unsqueeze", x, 0)
    return x
