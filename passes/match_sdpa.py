"""`scaled_dot_product_attention`, positional, by keyword or mixed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from .attention_site import AttentionSite, Spelling
from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan

_TARGETS = (
    torch._C._nn.scaled_dot_product_attention,
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def _sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, *,
    scale: Any = None, enable_gqa: Any = False,
) -> None:  # fmt: skip
    """Signature of `torch.nn.functional.scaled_dot_product_attention`."""


_SIGNATURE = inspect.signature(_sdpa)


class SdpaSpelling(Spelling):
    """`[B, H, S, D]` in and out: the arguments are the site's. Where autocast casts them, so do we."""

    name = "scaled_dot_product_attention"

    def pattern(self, node: fx.Node) -> AttentionSite | None:
        if node.target not in _TARGETS:
            return None
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        q, k, v, *rest = bound.arguments.values()
        q, k, v = (_cast_to_result(x, node) for x in (q, k, v))
        return AttentionSite(node, q, k, v, *rest)


def _cast_to_result(x: fx.Node, node: fx.Node) -> Operand:
    """`x` in the dtype of the attention's result, which is where autocast takes it."""
    before, after = fake_tensor(x), fake_tensor(node)
    return x if before is None or after is None or before.dtype == after.dtype else plan("to", x, after.dtype)
