"""Layer norm with the residual sum before it and the modulation after it, found from the norm."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from .graph_inputs import fake_tensor, is_sized, known_size, special_kind
from .match_modulation import below_casts, cast_without_detach, is_computed, is_like, match_modulation, match_sum
from .pointwise_steps import FLOATS, is_dense, symbol_or_self
from .writes import switches_gradients, written_meanwhile


class Operands(NamedTuple):
    """Arguments of `add_normalize`; `normalize` takes those that are not about a sum."""

    x: fx.Node
    y: fx.Node | None
    gate: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    scale: fx.Node | None
    shift: fx.Node | None
    eps: float | torch.SymFloat
    """A symbol where `dynamic=True` made one of it."""


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


def match_layer_norm(norm: fx.Node) -> LayerNorm | None:
    """The residual, the norm and the modulation around `norm`, if nothing else uses or changes what is in between."""
    if norm.target not in (F.layer_norm, torch.layer_norm):
        return None
    bound = _SIGNATURE.bind(*norm.args, **norm.kwargs)
    bound.apply_defaults()
    source, shape, weight, bias, eps = list(bound.arguments.values())[:5]
    eps = symbol_or_self(eps)
    if not isinstance(source, fx.Node) or not isinstance(eps, float | torch.SymFloat):
        return None
    if not isinstance(shape, list | tuple) or len(shape) != 1:
        return None
    read, casts = below_casts(source, norm)
    modulation, added = match_modulation(norm, read), match_sum(read)
    if modulation is None or (added is None and is_computed(read)):
        return None
    (weight, by_weight), (bias, by_bias) = (
        below_casts(vector, norm) if isinstance(vector, fx.Node) else (None, ()) for vector in (weight, bias)
    )
    span = {*casts, *by_weight, *by_bias, *modulation.span, *(added.span if added else ())}
    x, y, gate = added[:3] if added else (read, None, None)
    operands = Operands(x, y, gate, weight, bias, modulation.scale, modulation.shift, eps)
    return _placed(operands, modulation.out, read if added else None, span)


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enable: Any = True
) -> None:
    """Signature of `torch.layer_norm`; that of `torch.nn.functional` ends before the last argument."""


_SIGNATURE = inspect.signature(_layer_norm)


def _placed(operands: Operands, out: fx.Node, total: fx.Node | None, span: set[fx.Node]) -> LayerNorm | None:
    """With the place of the op, if there is one and the op takes these operands."""
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
    if written_meanwhile(nodes[:-1], out) is not None or _needs_gradients(nodes):
        return None
    return LayerNorm(operands, out, total, tuple(nodes), after) if _is_taken(operands, results) else None


def _needs_gradients(span: list[fx.Node]) -> bool:
    """Whether any of these nodes does, or the op may where it is put: they are switched on or off in between."""
    computed = [fake_tensor(node) for node in span if cast_without_detach(node) is None]  # a cast may be its input
    if any(fake is None or fake.requires_grad for fake in computed):
        return True
    return switches_gradients(span[0], span[-1])


def _is_taken(operands: Operands, results: list[fx.Node]) -> bool:
    """Whether `add_normalize` takes these shapes, dtypes and memory layouts, and its results are like the graph's."""
    x = fake_tensor(operands.x)
    if x is None or x.dim() != 3 or x.dtype not in FLOATS or not is_sized(x) or known_size(x.shape[2]) is None:
        return False
    vectors = [fake_tensor(node) for node in (operands.weight, operands.bias) if node is not None]
    return all(is_like(node, operands.x) for node in (operands.x, *results)) and all(
        vector is not None
        and vector.dtype in FLOATS
        and vector.device == x.device
        and is_dense(vector)
        and not special_kind(vector)
        for vector in vectors
    )
