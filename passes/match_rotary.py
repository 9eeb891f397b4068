"""RMS norm and rotary embedding of queries or keys, found from the norm."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, is_sized, known_size, special_kind
from .match_rotation import match_rotation, reshapes
from .planned_nodes import Operand, plan
from .pointwise_steps import FLOATS, is_dense, same_shape, symbol_or_self
from .writes import switches_gradients, written_meanwhile

_RMS_NORM = {torch.rms_norm, F.rms_norm}


class Rotary(NamedTuple):
    """A norm with the rotation of what it makes; the fields from `x` on are arguments of `normalize_rotate`."""

    out: fx.Node
    """The result, `[B, S, H, D]`, or `[B, S, D]` where all heads are rotated as one."""
    span: tuple[fx.Node, ...]
    """What computes it, in the order of the graph, `out` included."""
    x: Operand
    weight: fx.Node | None
    eps: float | torch.SymFloat
    """A symbol where `dynamic=True` made one of it."""
    per_head: bool
    cos: fx.Node
    sin: fx.Node


def match_rotary(norm: fx.Node) -> Rotary | None:
    """The norm and the rotation that begin at `norm`, if nothing else uses or changes what is in between."""
    if norm.target not in _RMS_NORM:
        return None
    bound = _SIGNATURE.bind(*norm.args, **norm.kwargs)
    bound.apply_defaults()
    x, shape, weight, eps = bound.arguments.values()
    if not isinstance(x, fx.Node) or not isinstance(shape, list | tuple) or len(shape) != 1:
        return None
    y = _heads_apart(norm)
    rotation = match_rotation(y)
    eps = symbol_or_self(eps)
    if rotation is None or not isinstance(eps, float | torch.SymFloat):
        return None
    place = {node: number for number, node in enumerate(norm.graph.nodes)}
    span = sorted({norm, y, *rotation.span}, key=place.__getitem__)
    if any(user not in span for node in span if node is not rotation.out for user in node.users):
        return None
    if any(place[user] < place[span[-1]] for user in rotation.out.users if user not in span):
        return None
    if written_meanwhile(span[:-1], span[-1]) is not None or switches_gradients(span[0], span[-1]):
        return None
    if any(fake.requires_grad for node in span if (fake := fake_tensor(node)) is not None):
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
    return user if reshapes(user, norm, (*before.shape[:2], *after.shape[2:])) else norm


def _checked(found: Rotary, y: fx.Node) -> Rotary | None:
    """With operands as `normalize_rotate` takes them, if shapes, dtypes and memory layouts are those it takes."""
    operands = (found.x, found.out, y, found.cos, found.sin, *([] if found.weight is None else [found.weight]))
    fakes = [fake for operand in operands if (fake := fake_tensor(operand)) is not None]
    if len(fakes) != len(operands) or not same_shape(found.out, y):
        return None
    if any(special_kind(fake) or fake.device != fakes[0].device or not is_sized(fake) for fake in fakes):
        return None
    x, out, rotated, cos, sin, *weights = fakes
    if x.dtype not in FLOATS or {out.dtype, rotated.dtype} != {x.dtype} or {cos.dtype, sin.dtype} != {torch.float32}:
        return None
    if any(weight.dtype not in FLOATS or not is_dense(weight) for weight in weights) or not is_dense(out):
        return None
    if x.dim() not in (3, 4) or out.dim() not in (3, 4) or x.dim() > out.dim():
        return None
    heads, dim = map(known_size, (1, *out.shape[2:])[-2:])
    if heads is None or dim is None:
        return None
    if not _is(x.stride(-1), 1) or (x.dim() == 4 and not _is(x.stride(2), dim)):
        return None
    if any(not _serves(table, out, dim) for table in (cos, sin)) or not _is(cos.shape[-1], sin.shape[-1]):
        return None
    given = found.x if x.dim() == 4 else plan("unflatten", found.x, -1, (heads, dim))
    return found._replace(x=given, per_head=x.dim() == 4)


def _is(size: int | torch.SymInt, wanted: int | torch.SymInt) -> bool:
    """Whether two sizes or strides are provably the same. Asking adds no guard."""
    return statically_known_true(size == wanted)


def _serves(table: torch.Tensor, out: torch.Tensor, dim: int) -> bool:
    """Whether cosines or sines are one row per token, the same for all heads."""
    if table.dim() != out.dim() or not (_is(table.shape[-1], dim) or _is(table.shape[-1], dim // 2)):
        return False
    if table.dim() == 4 and not _is(table.shape[2], 1):
        return False
    return (_is(table.shape[0], 1) or _is(table.shape[0], out.shape[0])) and _is(table.shape[1], out.shape[1])
