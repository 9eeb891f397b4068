"""Trace a tensor back to the projections it comes from: which activations, through which weights."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import fx

from .graph_inputs import fake_tensor, is_static
from .planned_nodes import Operand, PlannedNode

_PRODUCT = re.compile(r"\w*(linear|matmul|mm|gemv)|conv(?!er[ts])\w*|einsum|tensordot")
"""One word of the name of an operator that multiplies by a matrix: linear, addmm, conv3d, int8_linear, _scaled_mm."""
_CASTS_AND_VIEWS = {
    "to", "type_as", "float", "half", "bfloat16", "contiguous", "view", "reshape", "flatten", "unflatten", "transpose",
    "permute", "unsqueeze", "squeeze", "t", "clone", "detach", "type",
    torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.clone, torch.t,
}  # fmt: skip


_LARGEST_WEIGHT_EXPRESSION = 30


class Projection(NamedTuple):
    """`activation @ weight`, in whatever spelling (linear, matmul, addmm, convolution, a quantised op)."""

    activation: Operand
    weight: fx.Node


def trace_projections(start: object) -> list[Projection]:
    """Nearest projections above `start`, in a fixed order; empty where the graph does not show any."""
    found: dict[Projection, None] = {}
    seen: set[Operand] = set()
    pending: list[Operand] = [start] if isinstance(start, fx.Node | PlannedNode) else []
    while pending:
        node = pending.pop()
        if node in seen or is_static(node):
            continue
        seen.add(node)
        projection = _as_projection(node)
        if projection is not None:
            found[projection] = None
        else:
            pending.extend(reversed(node.all_input_nodes))
    return list(found)


def same_source(left: list[Projection], right: list[Projection]) -> bool:
    """Whether two tensors are projected from at least one common activation."""
    return bool({p.activation for p in left} & {p.activation for p in right})


def _as_projection(node: Operand) -> Projection | None:
    if not is_product(node):
        return None
    inputs = node.all_input_nodes
    roots = {n: _static_root(n) for n in inputs}
    weights = [root for root in roots.values() if root is not None]
    activations = [n for n in inputs if roots[n] is None and not is_static(n) and fake_tensor(n) is not None]
    if not weights or not activations:
        return None
    return Projection(_skip_casts(activations[0]), weights[0])


def is_product(node: Operand) -> bool:
    """Whether the name of a function or method says so; norms and rotary embeddings have static matrices as well."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return any(_PRODUCT.fullmatch(word) for word in re.split(r"[^a-z]+", str(name).lower()))


def _static_root(node: Operand) -> fx.Node | None:
    """The static matrix that `node` is, or is computed from without any activation (a normed or quantised weight)."""
    root: fx.Node | None = None
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if isinstance(current, fx.Node) and is_static(current):
            root = current if root is None and _is_matrix(current) else root
            continue
        parents = [n for n in current.all_input_nodes if n not in seen]
        if not current.all_input_nodes or len(seen) > _LARGEST_WEIGHT_EXPRESSION:
            return None
        seen.update(parents)
        pending.extend(parents)
    return root


def _is_matrix(node: fx.Node) -> bool:
    value = fake_tensor(node)
    return node.op == "get_attr" or (value is not None and value.dim() >= 2)


def _skip_casts(node: Operand) -> Operand:
    while node.op in ("call_function", "call_method") and node.target in _CASTS_AND_VIEWS:
        node = node.all_input_nodes[0]
    return node
