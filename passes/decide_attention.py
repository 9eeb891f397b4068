"""Decide for each attention site: rewrite it, and how, or leave it dense, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.symbol import SymT, symbol_is_type

from ..decisions import Reason
from ..errors import OptionValueError
from ..kernels.select_kernel import BREAK_EVEN, MAX_HEAD_DIM, MIN_HEAD_DIM, Kernel, select_kernel
from ..options import Options
from .attention_site import AttentionSite, Declined, Protection
from .find_launch_bound import LaunchBound
from .graph_inputs import (
    NESTED,
    fake_tensor,
    fake_value,
    follow_from_inputs,
    size_hint,
    special_kind,
)
from .match_key_mask import match_key_mask
from .place_output import OutputPlace, place_output
from .planned_nodes import Operand
from .served_sizes import Below, serve_only
from .trace_projections import same_source, trace_projections

_ANNOUNCE = (
    "run the sampling loop in `with lite_compile.generation(model) as g:` from the first call on, "
    "with `g.step()` before each call"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Rewrite:
    """A site that becomes the stateful op."""

    site: AttentionSite
    scale: float
    kernel: Kernel
    weight: fx.Node
    """Parameter whose identity is the layer's identity."""
    device: torch.device
    place: OutputPlace
    protection: Protection
    key_bias: Operand | None = None
    """float32 `[B | 1, Sk]`: what the site's mask amounts to."""


@dataclass(frozen=True)
class Decline:
    """A site that stays dense."""

    site: AttentionSite
    reason: Reason
    detail: str = ""
    below: Below | None = None
    """The sizes of which alone this is said; None: others are never rewritten either, or there are none."""


def decide_attention(
    sites: Sequence[AttentionSite],
    missing_clock: str | None,
    options: Options,
    per_step: Sequence[fx.Node] = (),
    launch_bound: LaunchBound | None = None,
) -> list[Rewrite | Decline]:
    """One decision per site. The graph is not changed.

    What stays dense because it is short is guarded: a short clip must not leave the longer ones after it dense.

    Args:
        missing_clock: what the clock lacks, or None.
        per_step: inputs that change from step to step.
        launch_bound: why all that can be rewritten had better not be, see `find_launch_bound`.
    """
    decisions: list[Rewrite | Decline] = []
    device: torch.device | None = None
    for site in sites:
        decision = _decide(site, missing_clock, options, per_step)
        if isinstance(decision, Rewrite) and launch_bound is not None:
            decision = Decline(site, Reason.LAUNCHES, *launch_bound)
        if isinstance(decision, Rewrite):
            device = device or decision.device
            if decision.device != device:
                decision = Decline(site, Reason.DEVICE, f"{decision.device}; the graph's state is on {device}")
        if isinstance(decision, Decline) and decision.below is not None:
            serve_only(decision.below)
        decisions.append(decision)
    return decisions


def _decide(
    site: AttentionSite, missing_clock: str | None, options: Options, per_step: Sequence[fx.Node]
) -> Rewrite | Decline:
    if not options.names.allow(site.layer):
        return Decline(site, Reason.EXCLUDED)
    q, k, v = fake_tensor(site.q), fake_tensor(site.k), fake_tensor(site.v)
    out = fake_tensor(site.node)
    if q is None or k is None or v is None or out is None or {q.dim(), k.dim(), v.dim()} != {4}:
        if site.declined is not None:
            return Decline(site, *site.declined)
        return Decline(site, Reason.RANK, "" if q is None else f"q has {q.dim()} dimensions")
    kind = next(filter(None, map(special_kind, (q, k, v))), "")
    if kind:
        return Decline(site, Reason.SUBCLASS, kind)

    projections = [trace_projections(node) for node in (site.q, site.k, site.v)]
    if not statically_known_true(q.shape[2] == k.shape[2]):
        return Decline(site, Reason.CROSS_ATTENTION)
    if all(projections) and not (
        same_source(projections[0], projections[1]) and same_source(projections[0], projections[2])
    ):
        return Decline(site, Reason.CROSS_ATTENTION, "k and v are projected from another input")

    protection = site.protection
    if not isinstance(protection, Protection) and protection.reason.by_design:
        return Decline(site, *protection)
    sizes = [*q.shape, *k.shape, *v.shape]
    if not all(map(size_hint, sizes)) or not follow_from_inputs(sizes, site.node.graph):
        return Decline(site, Reason.SIZE)
    if site.declined is not None:
        return Decline(site, *site.declined)
    key_bias = None if site.attn_mask is None else match_key_mask(site, q.shape[0], k.shape[2], per_step)
    if isinstance(key_bias, Declined):
        return Decline(site, *key_bias)
    if site.is_causal is not False:
        return Decline(site, Reason.CAUSAL)
    dropout_p = _number(site.dropout_p)
    if dropout_p is None or _hint(dropout_p) != 0:
        return Decline(site, Reason.DROPOUT, f"p={site.dropout_p}; call model.eval()")
    scale = _number(site.scale)
    if scale is None and site.scale is not None:
        return Decline(site, Reason.SCALE)
    if not _may_share_heads(site, q, k):
        return Decline(site, Reason.GQA, f"{q.shape[1]} heads in q, {k.shape[1]} in k")
    if not statically_known_true(q.shape[0] == k.shape[0]) or k.shape[:3] != v.shape[:3]:
        return Decline(site, Reason.RANK, "q, k and v have to agree in batch, heads and length")
    if any(x.requires_grad for x in (q, k, v, out)):
        return Decline(site, Reason.GRAD, "the op has no backward; run under torch.no_grad()")
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype == out.dtype:
        return Decline(
            site, Reason.DTYPE, f"q {q.dtype}, k {k.dtype}, v {v.dtype} -> {out.dtype}".replace("torch.", "")
        )
    dim = q.shape[3]
    if not isinstance(dim, int) or v.shape[3] != dim or k.shape[3] != dim or not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        return Decline(
            site, Reason.HEAD_DIM, f"{dim}, v has {v.shape[3]}; {MIN_HEAD_DIM} to {MAX_HEAD_DIM} is supported"
        )
    kernel = select_kernel(q.device, q.dtype, dim, options.kernel, options.qk_dtype)
    least, why = _shortest(kernel, options)
    tokens = size_hint(q.shape[2])
    assert tokens is not None
    if tokens < least:
        else_rewritten = missing_clock is None and not site.in_subgraph and isinstance(kernel, Kernel)
        below = Below(q.shape[2], least) if else_rewritten and isinstance(protection, Protection) else None
        return Decline(site, Reason.SHORT, f"{tokens} tokens{why}", below)
    if not isinstance(protection, Protection):
        return Decline(site, *protection)
    if isinstance(kernel, str):
        if options.kernel != "auto" or options.qk_dtype is not None:
            name = "kernel" if options.qk_dtype is None else "qk_dtype"
            value = getattr(options, name)
            raise OptionValueError(f"liteattention option {name!r} is {value!r}; {site.layer}: {kernel}")
        return Decline(site, Reason.DEVICE, kernel)
    if site.in_subgraph:
        return Decline(site, Reason.SUBGRAPH, "of a higher-order operator (nested_compile_region, checkpoint, cond)")
    if missing_clock is not None:
        return Decline(
            site, Reason.NO_CLOCK, missing_clock if NESTED in missing_clock else f"{missing_clock}; {_ANNOUNCE}"
        )
    weight = next((p.weight for p in projections[0] if p.weight.op == "placeholder"), None)
    if weight is None:
        return Decline(site, Reason.NO_IDENTITY)
    place = place_output(site, q, out)
    if isinstance(place, str):
        return Decline(site, Reason.LAYOUT, place)
    # What torch took for variable becomes a constant here: another number is compiled anew.
    float(dropout_p)
    scale = 1.0 / math.sqrt(dim) if scale is None else float(scale)
    return Rewrite(site, scale, kernel, weight, q.device, place, protection, key_bias)


def _shortest(kernel: Kernel | str, options: Options) -> tuple[int, str]:
    """From how many tokens on a kernel pays, and who says so."""
    if isinstance(options.min_seq_len, int):
        return options.min_seq_len, f", min_seq_len={options.min_seq_len}"
    if isinstance(kernel, str):
        return min(BREAK_EVEN.values()), ""
    return kernel.break_even, f"; the {kernel.name} kernel pays from {kernel.break_even} on (option min_seq_len)"


def _may_share_heads(site: AttentionSite, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether each head of q has one of k: there are as many, one for all, or groups of heads share one."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if statically_known_true(heads == kv_heads) or statically_known_true(kv_heads == 1):
        return True
    return site.enable_gqa is True and statically_known_true(heads % kv_heads == 0)


def _number(value: Any) -> float | torch.SymFloat | None:
    """A Python number of the model, which `dynamic=True` makes a symbol; None if sizes or tensors are in it."""
    value = fake_value(value) if isinstance(value, fx.Node) else value
    if isinstance(value, torch.SymFloat):
        return value if all(symbol_is_type(s, SymT.FLOAT) for s in value.node.expr.free_symbols) else None
    return value if isinstance(value, int | float) else None


def _hint(value: float | torch.SymFloat) -> float | None:
    hint: float | None = value.node.hint if isinstance(value, torch.SymFloat) else value
    return hint
