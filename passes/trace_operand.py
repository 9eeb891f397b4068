"""Trace an operand of a product up through transpositions, constant scales and upcasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan
from .pointwise_steps import cast_of, is_number, scale_of

_SWAPS = {
    "transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims,
    torch.ops.aten.transpose.int,
}  # fmt: skip
_PERMUTES = {"permute", torch.permute, torch.ops.aten.permute.default}


class Origin(NamedTuple):
    """The operand is `factor * node.permute(dims)`, up to a cast from a narrower dtype, or one to `cast` at last."""

    node: fx.Node
    dims: tuple[int, ...]
    factor: float
    passed: tuple[fx.Node, ...]
    """Nodes between the operand and `node`."""
    cast: torch.dtype | None = None
    """What autocast makes of the operand where it is used."""

    @property
    def dtype(self) -> torch.dtype | None:
        fake = fake_tensor(self.node)
        return self.cast if self.cast is not None or fake is None else fake.dtype

    def planned(self) -> Operand:
        """The operand without its factor."""
        straight = self.dims == tuple(range(len(self.dims)))
        operand = self.node if straight else plan("permute", self.node, *self.dims)
        return operand if self.cast is None else plan("to", operand, self.cast)


def trace_operand(node: fx.Node, dims: Sequence[int], product: fx.Node, scaled: bool) -> list[Origin]:
    """All origins of `node.permute(dims)`, the nearest first. Scales are passed only if `scaled`.

    Args:
        product: the matrix product whose operand `node` is. If its dtype is another one, autocast casts.
    """
    nearest = Origin(node, tuple(dims), 1.0, ())
    result = fake_tensor(product)
    cast = [] if result is None or result.dtype == nearest.dtype else [nearest._replace(cast=result.dtype)]
    return [*cast, *_origins(nearest, scaled)]


def _origins(nearest: Origin, scaled: bool) -> list[Origin]:
    """That one and those that it comes from."""
    origins = [nearest]
    while True:
        current, order, factor, passed, _ = origins[-1]
        source: Any = None
        if (permutation := permutation_of(current)) is not None:
            source = current.args[0]
            order = tuple(permutation[dim] for dim in order)
        elif (cast := _upcast_of(current)) is not None:
            source = cast
        elif scaled and (scale := scale_of(current, in_place=False)) is not None and is_number(scale[1]):
            source = scale[0]
            factor *= scale[1]
        before, after = fake_tensor(source), fake_tensor(current)
        if before is None or after is None or before.dim() != after.dim():
            return origins
        origins.append(Origin(source, order, factor, (*passed, current)))


def choose_origin(origins: Sequence[Origin], dtype: torch.dtype) -> Origin | None:
    """The farthest origin of that dtype, better one that needs no permutation; None if there is none."""
    fitting = [origin for origin in origins if origin.dtype == dtype]
    straight = [origin for origin in fitting if origin.dims == tuple(range(len(origin.dims)))]
    best = straight or fitting
    return best[-1] if best else None


def permutation_of(node: Operand) -> list[int] | None:
    """`p` where `node` is `source.permute(p)`."""
    fake = fake_tensor(node)
    if fake is None or not node.args or node.kwargs:
        return None
    rank = fake.dim()
    dims: Sequence[Any] = node.args[1:]
    order = list(range(rank))
    if node.target is getattr and dims == ("mT",):
        dims = (-1, -2)
    elif node.target in ("t", torch.t) and rank == 2:
        dims = (0, 1)
    elif node.target in _PERMUTES:
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
        return [dim % rank for dim in dims] if all(isinstance(dim, int) for dim in dims) else None
    elif node.target not in _SWAPS:
        return None
    if len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    first, second = (dim % rank for dim in dims)
    order[first], order[second] = order[second], order[first]
    return order


def _upcast_of(node: fx.Node) -> fx.Node | None:
    """Input of a copy, or of a cast that loses nothing."""
    source = cast_of(node)
    return source if source is not None and loses_nothing(source, node) else None


def loses_nothing(source: fx.Node, cast: fx.Node) -> bool:
    """Whether every value of `source` can be held in the dtype of `cast`."""
    before, after = fake_tensor(source), fake_tensor(cast)
    if before is None or after is None:
        return False
    return torch.promote_types(before.dtype, after.dtype) == after.dtype
