"""Batched matrix products, in whatever spelling, with a label for each dimension."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph_inputs import fake_tensor

Labels = tuple[Hashable, ...]

_MATMUL = {
    torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__",
    torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.ops.aten.matmul, torch.ops.aten.bmm,
}  # fmt: skip
BADDBMM = {torch.baddbmm, "baddbmm", torch.ops.aten.baddbmm.default, torch.ops.aten.baddbmm}
_EINSUM = {torch.einsum, torch.functional.einsum}


@dataclass(frozen=True)
class Product:
    """`node = alpha * left @ right + beta * added`: labels that the result lacks are summed over."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    labels: Labels
    """Labels of the result's dimensions."""
    alpha: Any = 1
    beta: Any = 1
    added: Any = None

    @property
    def rows_before_keys(self) -> bool:
        """Whether the last two dimensions of the result are of one operand each: rows and columns of a matrix."""
        shared = set(self.left_labels) & set(self.right_labels)
        return len(self.labels) > 1 and not shared & set(self.labels[-2:])


def as_product(node: Any) -> Product | None:
    """`node` as a product of two tensors with as many dimensions, or None if it is none."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in _EINSUM:
        return _einsum(node)
    if node.target in _MATMUL and len(node.args) == 2 and not node.kwargs:
        return _matmul(node, *node.args)
    if node.target in BADDBMM and len(node.args) == 3 and set(node.kwargs) <= {"alpha", "beta"}:
        added, left, right = node.args
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        return _matmul(node, left, right, alpha, beta, None if beta == 0 else added)
    return None


def _matmul(node: fx.Node, left: Any, right: Any, alpha: Any = 1, beta: Any = 1, added: Any = None) -> Product | None:
    fakes = (fake_tensor(left), fake_tensor(right))
    if fakes[0] is None or fakes[1] is None or fakes[0].dim() != fakes[1].dim() or fakes[0].dim() < 2:
        return None
    batch = tuple(range(fakes[0].dim() - 2))
    return Product(
        node, left, right, (*batch, "row", "sum"), (*batch, "sum", "column"), (*batch, "row", "column"),
        alpha, beta, added,
    )  # fmt: skip


def _einsum(node: fx.Node) -> Product | None:
    if node.kwargs or len(node.args) < 2:
        return None
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or equation.count("->") != 1:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    ranks = [0 if (fake := fake_tensor(operand)) is None else fake.dim() for operand in operands]
    left, right = operands
    if len(terms) != 2 or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    labels = [_expand(term, rank) for term, rank in zip((*terms, result), (*ranks, _rank(node)), strict=True)]
    if any(len(set(group)) != len(group) or len(group) == 0 for group in labels):
        return None  # a diagonal, or not what it seems
    return Product(node, left, right, labels[0], labels[1], labels[2])


def _rank(node: fx.Node) -> int:
    fake = fake_tensor(node)
    return 0 if fake is None else fake.dim()


def _expand(term: str, rank: int) -> Labels:
    """Labels of one operand; the dimensions of an ellipsis are numbered from the right, as they are aligned."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    if (hidden != 0 and not dots) or hidden < 0:
        return ()
    return (*before, *range(-hidden, 0), *after)
