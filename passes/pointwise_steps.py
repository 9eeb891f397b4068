"""Single steps between the products of hand-written attention: casts, scales, additions, dropout, views.

Each function says what a node does to its first input, or None if it is something else.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, fake_value
from .planned_nodes import Operand, PlannedNode, plan
from .trace_product import BADDBMM
from .writes import writes

aten = torch.ops.aten
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_COPIES = {"contiguous", "clone", "detach", torch.clone, torch.detach}
_MUL = {operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__", aten.mul.Tensor, aten.mul.Scalar}
_MUL_IN_PLACE = {operator.imul, "mul_", "multiply_"}
_DIV = {operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide", aten.div.Tensor}
_DIV_IN_PLACE = {operator.itruediv, "div_", "divide_"}
_ADD = {operator.add, torch.add, "add", aten.add.Tensor}
_ADD_IN_PLACE = {operator.iadd, "add_"}
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    torch.reshape,
    torch.flatten,
    torch.unflatten,
}
_MASKED_FILL = {"masked_fill", "masked_fill_", torch.masked_fill, torch.where, "where"}
_HIDDEN = -1e4
"""Scores from here down have no weight beside any that was not hidden."""
_ZEROS = {torch.zeros, torch.zeros_like, "new_zeros"}
_ZEROS_VIEWED = {
    "to", "float", "half", "bfloat16", "type_as", "expand", "unsqueeze", "view", "reshape", "repeat", "contiguous",
    "expand_as", operator.getitem, torch.unsqueeze, torch.reshape,
}  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _functional(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> None:
    """Signature of `torch.nn.functional.dropout`."""


def _builtin(input: Any, p: Any, train: Any) -> None:
    """Signature of `torch.dropout`."""


_DROPOUT = {F.dropout: inspect.signature(_functional), torch.dropout: inspect.signature(_builtin)}


def cast_of(node: fx.Node) -> fx.Node | None:
    """Input of a cast between the dtypes that the op accumulates in or better, or of a copy."""
    if node.target not in _CASTS and node.target not in _COPIES:
        return None
    source = node.args[0] if node.args else None
    before, after = fake_tensor(source), fake_tensor(node)
    if not isinstance(source, fx.Node) or before is None or after is None or before.device != after.device:
        return None
    return source if before.dtype in FLOATS and after.dtype in FLOATS else None


def scale_of(node: fx.Node, in_place: bool) -> tuple[fx.Node, Any] | None:
    """Input and factor of a multiplication or division; the factor is a node where it is a tensor."""
    if node.kwargs or len(node.args) != 2:
        return None
    left, right = map(symbol_or_self, node.args)
    if node.target in _DIV or (in_place and node.target in _DIV_IN_PLACE):
        if is_number(right):
            if right == 0:
                return None
            right = 1 / right
        elif isinstance(right, torch.SymFloat):
            right = 1 / right
    elif node.target in _MUL or (in_place and node.target in _MUL_IN_PLACE):
        if not isinstance(left, fx.Node):
            left, right = right, left
    else:
        return None
    if isinstance(left, fx.Node) and (is_number(right) or isinstance(right, fx.Node | torch.SymFloat)):
        return left, right
    return None


def symbol_or_self(value: Any) -> Any:
    """The symbol of a node that computes a Python number, anything else as it is."""
    fake = fake_value(value) if isinstance(value, fx.Node) else None
    return fake if isinstance(fake, torch.SymFloat) else value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def addition_of(node: fx.Node, in_place: bool) -> tuple[fx.Node, Any] | None:
    """Both terms of an addition, the larger one first."""
    if node.kwargs or len(node.args) != 2 or not (node.target in _ADD or (in_place and node.target in _ADD_IN_PLACE)):
        return None
    left, right = node.args
    if node.target in _ADD and isinstance(right, fx.Node) and not same_shape(left, node):
        left, right = right, left
    return (left, right) if isinstance(left, fx.Node) else None


def masking_of(node: fx.Node) -> fx.Node | None:
    """What a `masked_fill` or `where` leaves visible, of the result's shape."""
    if node.target not in _MASKED_FILL:
        return None
    places = node.args[1:] if node.target is torch.where else node.args[:1]
    return next((x for x in places if isinstance(x, fx.Node) and same_shape(x, node)), None)


class Hiding(NamedTuple):
    """Scores that give way to a number, so that they have no weight beside others."""

    where: Operand
    """bool, True where they do."""
    filler: float
    """The number in the scale of the softmax's argument."""


def hiding_of(node: fx.Node, scores: fx.Node, scale: Any) -> Hiding | None:
    """What a `masked_fill` or `where` of `scores` hides; None if it does not hide but change them.

    Args:
        scale: what the result is multiplied by before the softmax.
    """
    if node.kwargs or len(node.args) != 3:
        return None
    condition: Any
    filler: Any
    if node.target is torch.where:
        condition, *values = node.args
        hides = values[0] is not scores
        filler = values[0] if hides else values[1]
    else:
        _, condition, filler = node.args
        hides = node.target != "where"
    if not is_number(filler) or not is_number(scale) or scale <= 0 or filler * scale > _HIDDEN:
        return None
    if getattr(fake_tensor(condition), "dtype", None) is not torch.bool:
        return None
    return Hiding(condition if hides else plan("logical_not", condition), filler * scale)


def bias_that_hides(hidden: Operand, by: float = -math.inf, bias: Operand | None = None) -> PlannedNode:
    """float32, to be added to scores: what hides them where the bools `hidden` are true, else `bias` or 0.

    A finite `by` becomes the lowest float32, which float32 adds without a trace of the score as well.
    """
    lowest = -math.inf if by == -math.inf else torch.finfo(torch.float32).min
    zeros = plan(torch.zeros_like, hidden, dtype=torch.float32) if bias is None else plan("to", bias, torch.float32)
    return plan("masked_fill", zeros, hidden, lowest)


def dropout_of(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """Input of a dropout and its probability, 0 where it is switched off."""
    signature = _DROPOUT.get(node.target)  # type: ignore[arg-type]
    if signature is None:
        return None
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    source, p, training = list(bound.arguments.values())[:3]
    return (source, p if training is not False else 0.0) if isinstance(source, fx.Node) else None


def batch_view_of(node: fx.Node) -> fx.Node | None:
    """Input of a view that folds or unfolds the batch dimensions and leaves the last two as they are."""
    source = node.args[0] if node.args else None
    before, after = fake_tensor(source), fake_tensor(node)
    if node.target not in _VIEWS or before is None or after is None or before.dtype != after.dtype:
        return None
    if min(before.dim(), after.dim()) < 2:
        return None
    same = all(statically_known_true(a == b) for a, b in zip(before.shape[-2:], after.shape[-2:], strict=True))
    return source if same and isinstance(source, fx.Node) else None


def is_zero(value: Any, reader: fx.Node | None = None) -> bool:
    """Whether a term of a sum is provably zero: a number, or zeros that nothing writes to, `reader` least of all."""
    if is_number(value):
        return bool(value == 0)
    while isinstance(value, fx.Node) and _never_written(value, reader):
        if value.target in _ZEROS:
            return True
        if value.target not in _ZEROS_VIEWED or not value.args:
            return False
        value = value.args[0]
    return False


def _never_written(zeros: fx.Node, reader: fx.Node | None) -> bool:
    """Whether everything that is done with a tensor and its views is to add it to something, or to be read."""
    for user in zeros.users:
        if user is reader:
            continue
        if user.target in _ZEROS_VIEWED:
            if not _never_written(user, reader):
                return False
        elif user.target in _ADD_IN_PLACE:
            if user.args[0] is zeros:
                return False
        elif writes(user) or (user.target not in _ADD and user.target not in BADDBMM):
            return False
    return True


def same_shape(x: Any, node: Operand) -> bool:
    """Whether two nodes provably have the same shape. Asking adds no guard."""
    left, right = fake_tensor(x), fake_tensor(node)
    if left is None or right is None or left.dim() != right.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True))


def is_dense(fake: torch.Tensor) -> bool:
    """Whether a tensor is provably in row-major order without gaps. Asking adds no guard."""
    size: int | torch.SymInt = 1
    for length, stride in zip(reversed(fake.shape), reversed(fake.stride()), strict=True):
        if not statically_known_true(length == 1) and not statically_known_true(stride == size):
            return False
        size = size * length
    return True
