"""RMS norm and rotary embedding of queries or keys, found from the norm.

Two spellings of the rotation of the pairs `(y[2i], y[2i + 1])`: both halves written into an empty tensor, as Wan does,
and `y * cos + stack([-odd, even]) * sin`, as LTX and Flux do.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan
from .pointwise_steps import FLOATS, cast_of, same_shape, written_meanwhile

_RMS_NORM = {torch.rms_norm, F.rms_norm}
_RESHAPES = {"view", "reshape", "unflatten", "flatten", torch.reshape, torch.unflatten, torch.flatten}
_UNBIND = {"unbind", torch.unbind}
_MUL = {operator.mul, torch.mul, "mul"}
_ADD = {operator.add, torch.add, "add"}
_SUB = {operator.sub, torch.sub, "sub"}
_NEG = {operator.neg, torch.neg, "neg"}


class Rotary(NamedTuple):
    """A norm with the rotation of what it makes; the fields from `x` on are arguments of `normalize_rotate`."""

    out: fx.Node
    """The result, `[B, S, H, D]`, or `[B, S, D]` where all heads are rotated as one."""
    span: tuple[fx.Node, ...]
    """What computes it, in the order of the graph, `out` included."""
    x: Operand
    weight: fx.Node | None
    eps: float
    per_head: bool
    cos: Operand
    sin: Operand


class _Rotation(NamedTuple):
    out: fx.Node
    cos: fx.Node
    sin: fx.Node
    span: tuple[fx.Node, ...]


class _Pairs(NamedTuple):
    even: fx.Node
    odd: fx.Node
    span: tuple[fx.Node, ...]


def match_rotary(norm: fx.Node) -> Rotary | None:
    """The norm and the rotation that begin at `norm`, if nothing else uses or changes what is in between."""
    if norm.target not in _RMS_NORM:
        return None
    bound = _SIGNATURE.bind(*norm.args, **norm.kwargs)
    bound.apply_defaults()
    x, shape, weight, eps = bound.arguments.values()
    if not isinstance(x, fx.Node) or len(shape) != 1 or not isinstance(eps, float):
        return None
    y = _heads_apart(norm)
    rotation = _written_in_halves(y) or _added_to_swapped(y)
    if rotation is None:
        return None
    place = {node: number for number, node in enumerate(norm.graph.nodes)}
    span = sorted({norm, y, *rotation.span}, key=place.__getitem__)
    if any(user not in span for node in span if node is not rotation.out for user in node.users):
        return None
    if any(place[user] < place[span[-1]] for user in rotation.out.users if user not in span):
        return None
    if written_meanwhile(span[:-1], span[-1]) is not None:
        return None
    return _checked(Rotary(rotation.out, tuple(span), x, weight, eps, False, rotation.cos, rotation.sin), y)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> None:
    """Signature of `torch.rms_norm`."""


_SIGNATURE = inspect.signature(_rms_norm)


def _heads_apart(norm: fx.Node) -> fx.Node:
    """The view of `[B, S, H * D]` as `[B, S, H, D]` if that is what becomes of `norm`, else `norm`."""
    user = next(iter(norm.users)) if len(norm.users) == 1 else norm
    before, after = fake_tensor(norm), fake_tensor(user)
    if before is None or after is None or (before.dim(), after.dim()) != (3, 4):
        return norm
    return user if _reshapes(user, norm, (*before.shape[:2], *after.shape[2:])) else norm


def _reshapes(node: fx.Node, source: fx.Node, shape: tuple[Any, ...]) -> bool:
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
    if fake is None or not isinstance(fake.shape[-1], int) or fake.shape[-1] % 2:
        return None
    shape = (*fake.shape[:-1], fake.shape[-1] // 2, 2)
    view = next((user for user in y.users if _reshapes(user, y, shape)), None)
    unbind = next(iter(view.users)) if view is not None and len(view.users) == 1 else None
    if view is None or unbind is None or unbind.target not in _UNBIND or unbind.kwargs.get("dim", -1) != -1:
        return None
    if unbind.args[0] is not view or (len(unbind.args) == 1 and "dim" not in unbind.kwargs):
        return None
    if len(unbind.args) > 1 and unbind.args[1] not in (-1, fake.dim()):
        return None
    halves: dict[Any, fx.Node] = {user.args[1]: user for user in unbind.users if user.target is operator.getitem}
    if len(unbind.users) != 2 or set(halves) != {0, 1}:
        return None
    return _Pairs(halves[0], halves[1], (view, unbind, halves[0], halves[1]))


def _written_in_halves(y: fx.Node) -> _Rotation | None:
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
    products = (*first.args, *second.args)
    span = (
        *pairs.span,
        empty,
        first,
        second,
        *written.values(),
        *(node for node in products if isinstance(node, fx.Node)),
    )
    readers = [user for user in empty.users if user not in written.values()]
    if len(readers) == 1 and readers[0].target == "type_as" and cast_of(readers[0]) is empty:
        return _Rotation(readers[0], by_cos, by_sin, (*span, readers[0]))
    return _Rotation(empty, by_cos, by_sin, span)


def _half_written(node: fx.Node, target: fx.Node) -> int | None:
    """0 for `target[..., 0::2] = value` and 1 for `target[..., 1::2] = value`."""
    if node.target is not operator.setitem or node.args[0] is not target:
        return None
    index: Any = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice):
        return None
    start, stop, step = index[1].start or 0, index[1].stop, index[1].step
    return start if start in (0, 1) and stop is None and step == 2 else None


def _added_to_swapped(y: fx.Node) -> _Rotation | None:
    """`y * cos + stack([-odd, even], -1).flatten(-2) * sin`, each cast to float32 or not, and cast back."""
    pairs, fake = _pairs_of(y), fake_tensor(y)
    negated = next((user for user in pairs.odd.users if user.target in _NEG), None) if pairs else None
    stack = next(iter(negated.users), None) if negated is not None else None
    if pairs is None or fake is None or negated is None or stack is None or stack.target is not torch.stack:
        return None
    dim = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    halves = stack.args[0]
    if not isinstance(halves, list | tuple) or [*halves] != [negated, pairs.even] or dim not in (-1, fake.dim()):
        return None
    swapped = next((user for user in stack.users if _reshapes(user, stack, tuple(fake.shape))), None)
    if swapped is None:
        return None
    wide, wide_casts = _cast_to_float(y, but=pairs.span)
    swapped_wide, swapped_casts = _cast_to_float(swapped)
    for total in (user for product in wide.users for user in product.users if user.target in _ADD):
        if _is_unusual(total):
            continue
        for straight, crossed in (total.args, total.args[::-1]):
            cos, sin = _factor(straight, wide), _factor(crossed, swapped_wide)
            narrow = next(iter(total.users), total)
            if cos is None or sin is None or len(total.users) != 1 or cast_of(narrow) is not total:
                continue
            assert isinstance(straight, fx.Node)
            assert isinstance(crossed, fx.Node)
            casts = (*wide_casts, *swapped_casts)
            return _Rotation(
                narrow, cos, sin, (*pairs.span, negated, stack, swapped, *casts, straight, crossed, total, narrow)
            )
    return None


def _cast_to_float(node: fx.Node, but: tuple[fx.Node, ...] = ()) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """`node` in float32 where the graph has it so, and the cast."""
    for user in node.users:
        fake = fake_tensor(user)
        if user not in but and cast_of(user) is node and fake is not None and fake.dtype is torch.float32:
            return user, (user,)
    return node, ()


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


def _checked(found: Rotary, y: fx.Node) -> Rotary | None:
    """With operands as `normalize_rotate` takes them, if shapes, dtypes and memory layouts are those it takes."""
    operands = (found.x, found.out, y, found.cos, found.sin, *([] if found.weight is None else [found.weight]))
    fakes = [fake for operand in operands if (fake := fake_tensor(operand)) is not None]
    if len(fakes) != len(operands) or not same_shape(found.out, y):
        return None
    x, out, rotated, cos, sin, *weights = fakes
    if any(fake.device != x.device or fake.requires_grad for fake in (out, rotated, cos, sin, *weights)):
        return None
    if x.dtype not in FLOATS or {out.dtype, rotated.dtype} != {x.dtype} or {cos.dtype, sin.dtype} != {torch.float32}:
        return None
    if x.dim() not in (3, 4) or out.dim() not in (3, 4) or x.dim() > out.dim():
        return None
    heads, dim = (1, *out.shape[2:])[-2:]
    if not isinstance(heads, int) or not isinstance(dim, int) or not _is_dense(out) or not all(map(_is_dense, weights)):
        return None
    if x.stride(-1) != 1 or (x.dim() == 4 and x.stride(2) != dim):
        return None
    if any(not _serves(table, out, dim) for table in (cos, sin)) or cos.shape[-1] != sin.shape[-1]:
        return None
    given = found.x if x.dim() == 4 else plan("unflatten", found.x, -1, (heads, dim))
    found = found._replace(x=given, per_head=x.dim() == 4)
    if out.dim() == 4:
        return found
    return found._replace(cos=plan("unsqueeze", found.cos, 2), sin=plan("unsqueeze", found.sin, 2))


def _is_dense(fake: torch.Tensor) -> bool:
    """Whether a tensor is provably in row-major order without gaps. Asking adds no guard."""
    size: int | torch.SymInt = 1
    for length, stride in zip(reversed(fake.shape), reversed(fake.stride()), strict=True):
        if not statically_known_true(length == 1) and not statically_known_true(stride == size):
            return False
        size = size * length
    return True


def _serves(table: torch.Tensor, out: torch.Tensor, dim: int) -> bool:
    """Whether cosines or sines are one row per token, the same for all heads."""
    if table.dim() != out.dim() or table.shape[-1] not in (dim, dim // 2):
        return False
    if table.dim() == 4 and table.shape[2] != 1:
        return False
    batch = statically_known_true(table.shape[0] == 1) or statically_known_true(table.shape[0] == out.shape[0])
    return batch and statically_known_true(table.shape[1] == out.shape[1])
