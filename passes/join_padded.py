"""Concatenation by addition: two tensors that were padded with zeros, each where the other is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor
from .move_tokens import argument, function_name
from .planned_nodes import Operand
from .pointwise_steps import addition_of


def join_padded(node: Operand) -> tuple[tuple[Operand, Operand], int] | None:
    """The tensors that the sum `node` puts one after another, and along which dimension; None if it does not."""
    terms = addition_of(node, in_place=True) if isinstance(node, fx.Node) else None
    if terms is None or not all(map(_is_padding, terms)):
        return None
    (left, left_widths), (right, right_widths) = (_padded(term) for term in terms)
    before, after, whole = fake_tensor(left), fake_tensor(right), fake_tensor(node)
    if before is None or after is None or whole is None or not before.dim() == after.dim() == whole.dim():
        return None
    padded = [dim for dim in range(whole.dim()) if not statically_known_true(before.shape[dim] == whole.shape[dim])]
    if len(padded) != 1:
        return None
    (dim,) = padded
    if not statically_known_true(before.shape[dim] + after.shape[dim] == whole.shape[dim]):
        return None
    place = 2 * (whole.dim() - 1 - dim)
    # What is padded at one side only lies at the other.
    sides = [widths[place : place + 2] for widths in (left_widths, right_widths)]
    if sides[0][:1] == [0] and sides[1][1:] in ([0], []):
        return (left, right), dim
    if sides[1][:1] == [0] and sides[0][1:] in ([0], []):
        return (right, left), dim
    return None


def _is_padding(node: Any) -> bool:
    """Whether a node pads with zeros."""
    if not isinstance(node, fx.Node) or function_name(node) != "pad":
        return False
    return argument(node, 2, "mode", "constant") == "constant" and argument(node, 3, "value", None) in (None, 0)


def _padded(node: fx.Node) -> tuple[Operand, list[Any]]:
    """What is padded, and the widths before and after each dimension, the last dimension first."""
    widths: Sequence[Any] = argument(node, 1, "pad", ())
    return node.args[0], list(widths)  # type: ignore[return-value]
