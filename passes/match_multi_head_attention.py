"""`torch.nn.MultiheadAttention`, which Dynamo keeps as one call that holds the projections as well."""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from ..decisions import Reason
from .attention_site import AttentionSite, Declined, Spelling, dead_ends, first_result, other_results_used
from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan
from .pointwise_steps import bias_that_hides

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_WHOLE_LAYERS = (torch._transformer_encoder_layer_fwd,)
_UNSUPPORTED = ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")


class _Call(NamedTuple):
    node: fx.Node
    out_weight: Any
    out_bias: Any
    declined: Declined | None


class MultiheadAttentionSpelling(Spelling):
    """`[S, B, E]` in and out: the projections become calls of their own around the attention."""

    name = "torch.nn.MultiheadAttention"

    def pattern(self, node: fx.Node) -> AttentionSite | None:
        out = first_result(node)
        if out is None:
            return None
        if node.target in _WHOLE_LAYERS:
            x = node.args[0]
            whole = Declined(Reason.VARIANT, "one call computes the whole TransformerEncoderLayer")
            return AttentionSite(out, x, x, x, match=_Call(node, None, None, whole))
        if node.target is not F.multi_head_attention_forward:
            return None
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        call = bound.arguments
        declined = _unsupported(call)
        inputs = (call["query"], call["key"], call["value"])
        q, k, v = inputs if declined is not None else _project(call)
        return AttentionSite(
            out, q, k, v,
            attn_mask=None if declined is not None else _key_mask(call["key_padding_mask"]),
            dropout_p=call["dropout_p"] if call["training"] else 0.0,
            is_causal=call["is_causal"],
            inner=(node, *dead_ends(node)),
            match=_Call(node, call["out_proj_weight"], call["out_proj_bias"], declined),
        )  # fmt: skip

    def check(self, site: AttentionSite) -> Declined | None:
        call: _Call = site.match
        if call.declined is not None:
            return call.declined
        if other_results_used(call.node):
            return Declined(Reason.SHARED, "the attention weights; pass need_weights=False")
        return None

    def rewrite(self, site: AttentionSite, out: Operand) -> Operand:
        call: _Call = site.match
        merged = plan("flatten", plan("permute", out, 2, 0, 1, 3), 2)
        return plan(F.linear, merged, call.out_weight, call.out_bias)


def _unsupported(call: dict[str, Any]) -> Declined | None:
    named = next((name for name in _UNSUPPORTED if call[name] is not None and call[name] is not False), None)
    if named is not None:
        return Declined(Reason.VARIANT, named)
    if call["attn_mask"] is not None:
        return Declined(Reason.MASK, "attn_mask")
    shapes = [fake_tensor(call[name]) for name in ("query", "key", "value")]
    if any(x is None or x.dim() != 3 for x in shapes):
        return Declined(Reason.RANK, "the input has no batch dimension")
    return None


def _key_mask(padding: Any) -> Operand | None:
    """`[B, 1, 1, Sk]`, floats to be added, from `[B, Sk]`, where True is what must not be attended to."""
    if padding is None:
        return None
    is_bool = getattr(fake_tensor(padding), "dtype", None) is torch.bool
    bias = bias_that_hides(padding) if is_bool else padding
    return plan("unsqueeze", plan("unsqueeze", bias, 1), 1)


def _project(call: dict[str, Any]) -> tuple[Operand, Operand, Operand]:
    """q, k and v `[B, H, S, D]`."""
    query, key, value = call["query"], call["key"], call["value"]
    width, heads = call["embed_dim_to_check"], call["num_heads"]
    weight, bias = call["in_proj_weight"], call["in_proj_bias"]

    def rows(x: Any, part: int) -> Any:
        return None if x is None else plan(operator.getitem, x, slice(part * width, (part + 1) * width))

    def heads_first(x: Operand) -> Operand:
        return plan("permute", plan("unflatten", x, -1, (heads, width // heads)), 1, 2, 0, 3)

    if query is key is value and weight is not None and not call["use_separate_proj_weight"]:
        packed = plan("chunk", plan(F.linear, query, weight, bias), 3, -1)
        q, k, v = (heads_first(plan(operator.getitem, packed, part)) for part in range(3))
        return q, k, v
    weights = [call[f"{name}_proj_weight"] for name in "qkv"]
    if not call["use_separate_proj_weight"]:
        weights = [rows(weight, part) for part in range(3)]
    q, k, v = (
        heads_first(plan(F.linear, x, weights[part], rows(bias, part))) for part, x in enumerate((query, key, value))
    )
    return q, k, v
