"""Layer norm with the residual sum before it and the modulation after it, found from the norm."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, special_kind
from .pointwise_steps import FLOATS, cast_of, is_dense, same_shape, written_meanwhile

_MUL = {operator.mul, torch.mul, "mul"}
_ADD = {operator.add, torch.add, "add"}


class Operands(NamedTuple):
    """Arguments of `add_normalize`; `normalize` takes those that are not about a sum."""

    x: fx.Node
    y: fx.Node | None
    gate: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    scale: fx.Node | None
    shift: fx.Node | None
    eps: float


class LayerNorm(NamedTuple):
    """A norm with what surrounds it."""

    operands: Operands
    out: fx.Node
    """The result, `[B, S, C]`."""
    total: fx.Node | None
    """The sum that is normalised, where it is a part of what was found: then the op has it as another result."""
    span: tuple[fx.Node, ...]
    """What computes both, in the order of the graph, `out` last."""
    after: fx.Node
    """Where the op goes: behind this node all operands are there, and nothing before it reads a result."""


class _Sum(NamedTuple):
    x: fx.Node
    y: fx.Node
    gate: fx.Node | None
    span: tuple[fx.Node, ...]


class _Gated(NamedTuple):
    y: fx.Node
    gate: fx.Node | None
    span: tuple[fx.Node, ...]


class _Modulated(NamedTuple):
    out: fx.Node
    scale: fx.Node | None
    shift: fx.Node | None
    span: tuple[fx.Node, ...]


def match_layer_norm(norm: fx.Node) -> LayerNorm | None:
    """The residual, the norm and the modulation around `norm`, if nothing else uses or changes what is in between."""
    if norm.target not in (F.layer_norm, torch.layer_norm):
        return None
    bound = _SIGNATURE.bind(*norm.args, **norm.kwargs)
    bound.apply_defaults()
    source, shape, weight, bias, eps = list(bound.arguments.values())[:5]
    if not isinstance(source, fx.Node) or not isinstance(eps, float) or len(shape) != 1:
        return None
    read, casts = _below_casts(source, norm)
    modulated, added = _modulated(norm, read), _summed(read)
    if modulated is None or (added is None and _is_computed(read)):
        return None
    span = {*casts, *modulated.span, *(added.span if added else ())}
    x, y, gate = added[:3] if added else (read, None, None)
    (weight, by_weight), (bias, by_bias) = (
        _below_casts(vector) if isinstance(vector, fx.Node) else (None, ()) for vector in (weight, bias)
    )
    operands = Operands(x, y, gate, weight, bias, modulated.scale, modulated.shift, eps)
    return _placed(operands, modulated.out, read if added else None, span, (*by_weight, *by_bias))


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enable: Any = True
) -> None:
    """Signature of `torch.layer_norm`; that of `torch.nn.functional` ends before the last argument."""


_SIGNATURE = inspect.signature(_layer_norm)


def _placed(
    operands: Operands, out: fx.Node, total: fx.Node | None, span: set[fx.Node], left_out: Iterable[fx.Node]
) -> LayerNorm | None:
    """With the place of the op, if there is one and the op takes these operands.

    Args:
        left_out: casts of the graph whose sources are operands.
    """
    place = {node: number for number, node in enumerate(out.graph.nodes)}
    nodes = sorted(span, key=place.__getitem__)
    given = [node for node in operands if isinstance(node, fx.Node)]
    results = [out] if total is None else [out, total]
    if any(user not in span for node in nodes if node not in results for user in node.users):
        return None
    after = max((nodes[0], *given), key=place.__getitem__)
    readers = [user for node in results for user in node.users if user not in span]
    if any(place[user] <= place[after] for user in readers) or not span.isdisjoint(given):
        return None
    if written_meanwhile(span.union(left_out) - {out}, out) is not None:
        return None
    return LayerNorm(operands, out, total, tuple(nodes), after) if _is_taken(operands, results) else None


def _is_taken(operands: Operands, results: list[fx.Node]) -> bool:
    """Whether `add_normalize` takes these shapes, dtypes and memory layouts, and its results are like the graph's."""
    x = fake_tensor(operands.x)
    if x is None or x.dim() != 3 or x.dtype not in FLOATS or not isinstance(x.shape[-1], int):
        return False
    if not all(_is_like(node, operands.x) for node in (operands.x, *results)):
        return False
    vectors = [fake_tensor(node) for node in (operands.weight, operands.bias) if node is not None]
    return not any(fake is None or fake.requires_grad for fake in map(fake_tensor, results)) and all(
        vector is not None
        and vector.dtype in FLOATS
        and vector.device == x.device
        and vector.shape == x.shape[-1:]
        and is_dense(vector)
        and not special_kind(vector)
        for vector in vectors
    )


def _is_like(node: fx.Node, other: fx.Node) -> bool:
    """Whether both have the same shape, dtype and device, and `node` is plain and in row-major order."""
    left, right = fake_tensor(node), fake_tensor(other)
    if left is None or right is None or left.dtype is not right.dtype or left.device != right.device:
        return False
    return same_shape(node, other) and not special_kind(left) and is_dense(left)


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


def _is_computed(node: fx.Node) -> bool:
    """Whether `node` is a product or a sum, which Inductor computes while it normalises."""
    while (source := cast_of(node)) is not None:
        node = source
    return node.target in _ADD | _MUL


def _below_casts(node: fx.Node, reader: fx.Node | None = None) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What `node` is without the casts that lose nothing, and these.

    Args:
        reader: if given, a cast that is also read by anything else than it or the next cast is left on.
    """
    casts: list[fx.Node] = []
    while (source := cast_of(node)) is not None and (reader is None or list(node.users) == [reader]):
        before, after = fake_tensor(source), fake_tensor(node)
        if before is None or after is None or after.dtype not in (before.dtype, torch.float32):
            break
        casts.append(node)
        node, reader = source, None if reader is None else node
    return node, tuple(casts)


def _modulated(norm: fx.Node, read: fx.Node) -> _Modulated | None:
    """`cast(cast(norm) * scale + shift)` or a part of it, up to where it has the dtype of `read` for the last time."""
    found = scale = shift = None
    span: tuple[fx.Node, ...] = ()
    for node, vector in _chain(norm):
        if not _is_of(node, read):
            break
        if node.target in _MUL and scale is None and shift is None and _is_vector(vector, read):
            scale = vector
        elif node.target in _ADD and shift is None and _is_vector(vector, read):
            shift = vector
        elif node.target in _MUL | _ADD:  # what Inductor computes while it normalises
            return None
        span = (*span, node)
        if _is_of(node, read, or_wider=False):
            found = _Modulated(node, scale, shift, span)
    return found


def _chain(norm: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """`norm` and the casts, products and sums that follow, each the only user of the last, with its other operand."""
    node = norm
    yield node, None
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target not in _MUL | _ADD and cast_of(user) is not node:
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


def _is_of(node: fx.Node, read: fx.Node, or_wider: bool = True) -> bool:
    """Whether `node` has the dtype of `read`, or float32."""
    fake, wanted = fake_tensor(node), fake_tensor(read)
    if fake is None or wanted is None:
        return False
    return fake.dtype is wanted.dtype or (or_wider and fake.dtype is torch.float32)


def _summed(total: fx.Node) -> _Sum | None:
    """`total` as `cast(cast(x) + cast(y) * gate)`, with or without the casts and the gate."""
    casts: list[fx.Node] = []
    node = total
    while (source := cast_of(node)) is not None and _is_of(source, total):
        casts.append(node)
        node = source
    if node.target not in _ADD or len(node.args) != 2 or node.kwargs:
        return None
    for first, second in (node.args, node.args[::-1]):
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        x, x_casts = _below_casts(first, node)
        product, product_casts = _below_casts(second, node)
        gated = _gated(product, total)
        if gated is not None and x.target not in _MUL and _is_like(x, total) and _is_like(gated.y, total):
            return _Sum(x, gated.y, gated.gate, (*casts, node, *x_casts, *product_casts, *gated.span))
    return None


def _gated(product: fx.Node, total: fx.Node) -> _Gated | None:
    """`product` as `cast(y) * gate`, or as `y` where it is no product."""
    if product.target not in _MUL:
        return _Gated(product, None, ())
    if len(product.args) != 2 or product.kwargs or not _is_of(product, total):
        return None
    for value, gate in (product.args, product.args[::-1]):
        if isinstance(value, fx.Node) and isinstance(gate, fx.Node) and _is_vector(gate, total):
            y, casts = _below_casts(value, product)
            return _Gated(y, gate, (product, *casts))
    return None
