"""Attention as one operator: aten's fused kernels, and the custom ops of xformers and flash-attn.

An operator is known by its namespace and name, its arguments by their names in the schema. An argument that nobody
listed here has to be None: what it does is unknown.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import fx

from ..decisions import Reason
from .attention_site import AttentionSite, Declined, Spelling, dead_ends, first_result, other_results_used
from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan

_HEADS_FIRST = (r"aten::_scaled_dot_product_\w+(?<!_backward)",)
"""`[B, H, S, D]`."""
_HEADS_LAST = (
    r"aten::_(flash|efficient)_attention_forward",
    r"xformers\w*::(memory_)?efficient_attention(_forward)?(_cutlass|_ck)?",
    r"xformers_flash\w*::flash_fwd",
    r"\w*flash_attn\w*::(_?flash_attn(_func|_forward)?|fwd|mha_fwd)",
    r"\w+::(memory_efficient_attention|_?flash_attn_func|_?flash_attn_forward)",
)
"""`[B, S, H, D]`, or `[B * H, S, D]`."""

_SITE_ARGUMENTS = {
    "q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v",
    "attn_mask": "attn_mask", "attn_bias": "attn_mask", "bias": "attn_mask", "mask": "attn_mask",
    "dropout_p": "dropout_p", "p": "dropout_p", "is_causal": "is_causal", "causal": "is_causal",
    "scale": "scale", "softmax_scale": "scale", "enable_gqa": "enable_gqa",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "compute_log_sumexp", "compute_logsumexp", "return_debug_mask", "return_softmax", "return_attn_probs", "return_lse",
    "return_softmax_lse", "max_q", "max_k", "max_seqlen_q", "max_seqlen_k", "deterministic", "num_splits", "pack_gqa",
    "sm_margin", "is_rotary_interleaved",
}  # fmt: skip
_NEUTRAL: dict[str, list[Any]] = {
    "window_size": [(-1, -1)], "window_size_left": [-1], "window_size_right": [-1], "softcap": [0],
    "attention_chunk": [0], "custom_mask_type": [0],
}  # fmt: skip
"""Values, other than None, with which an argument has no effect."""


class _Call(NamedTuple):
    """What a call of an operator says beyond the site's arguments."""

    node: fx.Node
    heads_last: bool
    unsupported: str
    """The first argument that changes the result in a way that the op does not know, such as `softcap=30.0`."""


class FusedOpSpelling(Spelling):
    """One operator. The result is the first of its outputs; the others may not be used."""

    name = "fused attention operator"

    def pattern(self, node: fx.Node) -> AttentionSite | None:
        schema = _schema(node.target)
        if schema is None:
            return None
        heads_last = any(re.fullmatch(pattern, schema.name) for pattern in _HEADS_LAST)
        if not heads_last and not any(re.fullmatch(pattern, schema.name) for pattern in _HEADS_FIRST):
            return None
        arguments = _bind(schema, node)
        out = first_result(node)
        if arguments is None or out is None:
            return None
        site = {_SITE_ARGUMENTS[name]: value for name, value in arguments.items() if name in _SITE_ARGUMENTS}
        if not {"q", "k", "v"} <= set(site):
            return None
        if heads_last:
            site.update({name: _heads_first(site[name]) for name in ("q", "k", "v")})
            site["enable_gqa"] = "flash" in schema.name
        others = ((name, value) for name, value in arguments.items() if name not in _SITE_ARGUMENTS)
        unsupported = next((f"{name}={value}" for name, value in others if not _has_no_effect(name, value)), "")
        inner = () if out is node else (node, *dead_ends(node))
        return AttentionSite(out, inner=inner, match=_Call(node, heads_last, unsupported), **site)

    def check(self, site: AttentionSite) -> Declined | None:
        call: _Call = site.match
        if call.unsupported:
            return Declined(Reason.VARIANT, call.unsupported)
        mask = fake_tensor(site.attn_mask)
        if mask is not None and mask.dtype is torch.bool and not str(call.node.target).startswith("aten"):
            return Declined(Reason.MASK, "True may mean to attend or not to")
        if other_results_used(call.node):
            return Declined(Reason.SHARED, f"another output of {call.node.target}")
        return None

    def rewrite(self, site: AttentionSite, out: Operand) -> Operand:
        if not site.match.heads_last:
            return out
        dense = fake_tensor(site.node)
        return plan("squeeze", out, 0) if dense is not None and dense.dim() == 3 else plan("transpose", out, 1, 2)


def _schema(target: Any) -> torch.FunctionSchema | None:
    """Schema of an operator; of an operator without named overload, the default one's."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", None)
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def _bind(schema: torch.FunctionSchema, node: fx.Node) -> dict[str, Any] | None:
    """All arguments of the call by name, or None if they do not fit the schema (they are another overload's)."""
    names = [argument.name for argument in schema.arguments]
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return None
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if any(argument.name not in given and not argument.has_default_value() for argument in schema.arguments):
        return None
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema.arguments}


def _heads_first(x: Any) -> Any:
    """`[B, S, H, D]` or `[B * H, S, D]` as `[B, H, S, D]`; anything else as it is."""
    fake = fake_tensor(x)
    if fake is None or fake.dim() not in (3, 4):
        return x
    return plan("unsqueeze", x, 0) if fake.dim() == 3 else plan("transpose", x, 1, 2)


def _has_no_effect(name: str, value: Any) -> bool:
    if value is None or name in _WITHOUT_EFFECT:
        return True
    value = tuple(value) if isinstance(value, list) else value
    return not isinstance(value, fx.Node) and value in _NEUTRAL.get(name, [])
