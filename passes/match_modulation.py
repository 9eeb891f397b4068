"""What surrounds a layer norm: the sum before it, whose second term may have a gate, and the modulation after it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, special_kind
from .pointwise_steps import cast_of, is_dense, same_shape

_MUL = {operator.mul, torch.mul, "mul"}
_ADD = {operator.add, torch.add, "add"}
_DETACH = {torch.detach, "detach"}


class GatedSum(NamedTuple):
    x: fx.Node
    y: fx.Node
    gate: fx.Node | None
    span: tuple[fx.Node, ...]


class _Gated(NamedTuple):
    y: fx.Node
    gate: fx.Node | None
    span: tuple[fx.Node, ...]


class Modulation(NamedTuple):
    out: fx.Node
    scale: fx.Node | None
    shift: fx.Node | None
    span: tuple[fx.Node, ...]


def match_sum(total: fx.Node) -> GatedSum | None:
    """`total` as `cast(cast(x) + cast(y) * gate)`, with or without the casts and the gate."""
    casts: list[fx.Node] = []
    node = total
    while (source := cast_without_detach(node)) is not None and _is_of(source, total):
        casts.append(node)
        node = source
    if node.target not in _ADD or len(node.args) != 2 or node.kwargs:
        return None
    for first, second in (node.args, node.args[::-1]):
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        x, x_casts = below_casts(first, node)
        product, product_casts = below_casts(second, node)
        gated = _gated(product, total)
        if gated is None or _is_inlined(x) or _is_inlined(gated.y):
            continue
        if is_like(x, total) and is_like(gated.y, total):
            return GatedSum(x, gated.y, gated.gate, (*casts, node, *x_casts, *product_casts, *gated.span))
    return None


def _gated(product: fx.Node, total: fx.Node) -> _Gated | None:
    """`product` as `cast(y) * gate`, or as `y` where it is no product."""
    if product.target not in _MUL:
        return _Gated(product, None, ())
    if len(product.args) != 2 or product.kwargs or not _is_of(product, total):
        return None
    for value, gate in (product.args, product.args[::-1]):
        if isinstance(value, fx.Node) and isinstance(gate, fx.Node) and _is_vector(gate, total):
            y, casts = below_casts(value, product)
            return _Gated(y, gate, (product, *casts))
    return None


def match_modulation(norm: fx.Node, read: fx.Node) -> Modulation | None:
    """`cast(cast(norm) * scale + shift)` or a part of it, up to where it has the dtype of `read` for the last time."""
    found = scale = shift = None
    span: tuple[fx.Node, ...] = ()
    for node, vector in _chain(norm):
        if node.target in _MUL and scale is None and shift is None and _is_vector(vector, read):
            scale = vector
        elif node.target in _ADD and shift is None and _is_vector(vector, read):
            shift = vector
        elif node.target in _MUL | _ADD:  # what Inductor computes while it normalises
            return None
        if not _is_of(node, read):
            break
        span = (*span, node)
        if _is_of(node, read, or_wider=False):
            found = Modulation(node, scale, shift, span)
    return found


def _chain(norm: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """`norm` and the casts, products and sums that follow, each the only user of the last, with its other operand."""
    node = norm
    yield node, None
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target not in _MUL | _ADD and cast_without_detach(user) is not node:
            return
        yield user, _other(user, node)
        node = user


def _other(operation: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand of a product or a sum, if it is another tensor and there are no more arguments."""
    if len(operation.args) != 2 or operation.kwargs:
        return None
    left, right = operation.args
    other = right if left is node else left
    return other if isinstance(other, fx.Node) and other is not node else None


def _is_inlined(node: fx.Node) -> bool:
    """Whether `node` is computed for its reader alone, so that it need not be in memory."""
    return is_computed(node) and len(node.users) == 1


def is_computed(node: fx.Node) -> bool:
    """Whether `node` is a product or a sum, which Inductor computes while it normalises."""
    while (source := cast_without_detach(node)) is not None:
        node = source
    return node.target in _ADD | _MUL


def cast_without_detach(node: fx.Node) -> fx.Node | None:
    """`cast_of`, but the op reads what needs a gradient only where the graph does."""
    return None if node.target in _DETACH else cast_of(node)


def below_casts(node: fx.Node, reader: fx.Node | None = None) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What `node` is without the casts that lose nothing, and these.

    Args:
        reader: if given, a cast that is also read by anything else than it or the next cast is left on.
    """
    casts: list[fx.Node] = []
    while (source := cast_without_detach(node)) is not None and (reader is None or list(node.users) == [reader]):
        before, after = fake_tensor(source), fake_tensor(node)
        if before is None or after is None or after.dtype not in (before.dtype, torch.float32):
            break
        casts.append(node)
        node, reader = source, None if reader is None else node
    return node, tuple(casts)


def _is_vector(node: fx.Node | None, x: fx.Node) -> bool:
    """Whether `node` has one number per channel of `x`, the same for all tokens of a batch entry.

    One per token has to be somewhere in memory before the op, which costs more than the op saves.
    """
    vector, tokens = fake_tensor(node), fake_tensor(x)
    if vector is None or tokens is None or vector.dim() != 3 or tokens.dim() != 3 or special_kind(vector):
        return False
    if vector.dtype not in (torch.float32, tokens.dtype) or vector.device != tokens.device:
        return False
    batch = (1, tokens.shape[0])
    return (
        any(statically_known_true(vector.shape[0] == size) for size in batch)
        and statically_known_true(vector.shape[1] == 1)
        and statically_known_true(vector.shape[2] == tokens.shape[2])
    )


def is_like(node: fx.Node, other: fx.Node) -> bool:
    """Whether both have the same shape, dtype and device, and `node` is plain and in row-major order."""
    left, right = fake_tensor(node), fake_tensor(other)
    if left is None or right is None or left.dtype is not right.dtype or left.device != right.device:
        return False
    return same_shape(node, other) and not special_kind(left) and is_dense(left)


def _is_of(node: fx.Node, read: fx.Node, or_wider: bool = True) -> bool:
    """Whether `node` has the dtype of `read`, or float32."""
    fake, wanted = fake_tensor(node), fake_tensor(read)
    if fake is None or wanted is None:
        return False
    return fake.dtype is wanted.dtype or (or_wider and fake.dtype is torch.float32)
