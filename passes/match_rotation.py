"""The rotation of the pairs `(y[2i], y[2i + 1])` of a tensor, in two spellings.

Both halves written into an empty tensor, as Wan does, and `y * cos + stack([-odd, even]) * sin`, as LTX and Flux do.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, known_size
from .pointwise_steps import cast_of

_RESHAPES = {"view", "reshape", "unflatten", "flatten", torch.reshape, torch.unflatten, torch.flatten}
_UNBIND = {"unbind", torch.unbind}
_MUL = {operator.mul, torch.mul, "mul"}
_ADD = {operator.add, torch.add, "add"}
_SUB = {operator.sub, torch.sub, "sub"}
_NEG = {operator.neg, torch.neg, "neg"}


class Rotation(NamedTuple):
    """What becomes of `y`: its even elements are the real parts, its odd ones the imaginary parts that are rotated."""

    out: fx.Node
    cos: fx.Node
    sin: fx.Node
    span: tuple[fx.Node, ...]
    """What computes it, in no order, `out` included."""


class _Pairs(NamedTuple):
    even: fx.Node
    odd: fx.Node
    span: tuple[fx.Node, ...]


def match_rotation(y: fx.Node) -> Rotation | None:
    """The rotation of `y`, in either spelling. Who else uses what is in between has to be looked at."""
    rotation = _written_in_halves(y) or _added_to_swapped(y)
    if rotation is None or {rotation.cos, rotation.sin} & {y, *rotation.span}:
        return None
    return rotation


def reshapes(node: fx.Node, source: fx.Node, shape: tuple[Any, ...]) -> bool:
    """Whether `node` is nothing but `source` in another, row-major shape."""
    fake = fake_tensor(node)
    if node.target not in _RESHAPES or not node.args or node.args[0] is not source:
        return False
    if fake is None or fake.dim() != len(shape):
        return False
    return all(statically_known_true(a == b) for a, b in zip(fake.shape, shape, strict=True))


def _pairs_of(y: fx.Node) -> _Pairs | None:
    """`y[..., 0::2]` and `y[..., 1::2]`, where the last dimension is taken apart into them."""
    fake = fake_tensor(y)
    width = None if fake is None else known_size(fake.shape[-1])
    if fake is None or width is None or width % 2:
        return None
    shape = (*fake.shape[:-1], width // 2, 2)
    view = next((user for user in y.users if reshapes(user, y, shape)), None)
    unbind = next(iter(view.users)) if view is not None and len(view.users) == 1 else None
    if view is None or unbind is None or unbind.target not in _UNBIND:
        return None
    if _dim_of(unbind) not in (-1, fake.dim()) or unbind.args[:1] != (view,):
        return None
    halves: dict[Any, fx.Node] = {user.args[1]: user for user in unbind.users if user.target is operator.getitem}
    if len(unbind.users) != 2 or set(halves) != {0, 1}:
        return None
    return _Pairs(halves[0], halves[1], (view, unbind, halves[0], halves[1]))


def _dim_of(operation: fx.Node) -> Any:
    """The dimension that `unbind` or `stack` is told; None if it is told anything else, too."""
    if len(operation.args) == 1 and set(operation.kwargs) <= {"dim"}:
        return operation.kwargs.get("dim", 0)
    return operation.args[1] if len(operation.args) == 2 and not operation.kwargs else None


def _written_in_halves(y: fx.Node) -> Rotation | None:
    """`out = empty_like(y); out[..., 0::2] = even * cos - odd * sin; out[..., 1::2] = even * sin + odd * cos`."""
    pairs = _pairs_of(y)
    empty = next((user for user in y.users if user.target is torch.empty_like), None)
    if pairs is None or empty is None or empty.args != (y,) or empty.kwargs:
        return None
    written: dict[int, fx.Node] = {}
    for user in empty.users:
        half = _half_written(user, empty)
        if half is not None and half not in written:
            written[half] = user
    if set(written) != {0, 1}:
        return None
    first, second = written[0].args[2], written[1].args[2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if first.target not in _SUB or second.target not in _ADD or any(map(_is_unusual, (first, second))):
        return None
    by_cos, by_sin = (_factor(term, of) for term, of in zip(first.args, pairs[:2], strict=True))
    swapped = [(_factor(a, pairs.even), _factor(b, pairs.odd)) for a, b in (second.args, second.args[::-1])]
    if by_cos is None or by_sin is None or (by_sin, by_cos) not in swapped:
        return None
    products: tuple[Any, ...] = (*first.args, *second.args)
    span = (*pairs.span, empty, first, second, *written.values(), *products)
    readers = [user for user in empty.users if user not in written.values()]
    if len(readers) == 1 and readers[0].target == "type_as" and cast_of(readers[0]) is empty:
        return Rotation(readers[0], by_cos, by_sin, (*span, readers[0]))
    return Rotation(empty, by_cos, by_sin, span)


def _half_written(node: fx.Node, target: fx.Node) -> int | None:
    """0 for `target[..., 0::2] = value` and 1 for `target[..., 1::2] = value`."""
    if node.target is not operator.setitem or node.args[0] is not target:
        return None
    index: Any = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice):
        return None
    start, stop, step = index[1].start or 0, index[1].stop, index[1].step
    return start if start in (0, 1) and stop is None and step == 2 else None


def _added_to_swapped(y: fx.Node) -> Rotation | None:
    """`y * cos + stack([-odd, even], -1).flatten(-2) * sin`, each cast to float32 or not, and cast back."""
    pairs, fake = _pairs_of(y), fake_tensor(y)
    negated = next((user for user in pairs.odd.users if _negates(user, pairs.odd)), None) if pairs else None
    stack = next(iter(negated.users), None) if negated is not None else None
    if pairs is None or fake is None or negated is None or stack is None or stack.target is not torch.stack:
        return None
    if _dim_of(stack) not in (-1, fake.dim()) or stack.args[0] not in ([negated, pairs.even], (negated, pairs.even)):
        return None
    swapped = next((user for user in stack.users if reshapes(user, stack, tuple(fake.shape))), None)
    if swapped is None:
        return None
    wide, wide_casts = _cast_to_float(y, but=pairs.span)
    swapped_wide, swapped_casts = _cast_to_float(swapped)
    for total in (user for product in wide.users for user in product.users):
        narrow = next(iter(total.users), total)
        if total.target not in _ADD or _is_unusual(total) or len(total.users) != 1 or cast_of(narrow) is not total:
            continue
        for terms in (total.args, total.args[::-1]):
            cos, sin = (_factor(term, of) for term, of in zip(terms, (wide, swapped_wide), strict=True))
            if cos is not None and sin is not None:
                products: tuple[Any, ...] = terms
                span = (*pairs.span, negated, stack, swapped, *wide_casts, *swapped_casts, *products, total, narrow)
                return Rotation(narrow, cos, sin, span)
    return None


def _cast_to_float(node: fx.Node, but: tuple[fx.Node, ...] = ()) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """`node` in float32 where the graph has it so, and the cast."""
    for user in node.users:
        fake = fake_tensor(user)
        if user not in but and cast_of(user) is node and fake is not None and fake.dtype is torch.float32:
            return user, (user,)
    return node, ()


def _negates(node: fx.Node, of: fx.Node) -> bool:
    return node.target in _NEG and node.args == (of,) and not node.kwargs


def _factor(product: Any, of: fx.Node) -> fx.Node | None:
    """What `of` is multiplied by in `product`, None if that is something else."""
    if not isinstance(product, fx.Node) or product.target not in _MUL or _is_unusual(product):
        return None
    left, right = product.args
    other = right if left is of else left if right is of else None
    return other if isinstance(other, fx.Node) else None


def _is_unusual(operation: fx.Node) -> bool:
    """Whether an operation of two operands has other arguments, such as `alpha`."""
    return len(operation.args) != 2 or bool(operation.kwargs)
