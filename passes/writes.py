"""What happens between two nodes of a graph: writes in place, and gradients switched on or off."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable

import torch
from torch import fx

_WRITES = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift,
}  # fmt: skip
_WRITING_METHODS = {f"__{function.__name__}__" for function in _WRITES}
_NAMED_LIKE_WRITES = {operator.and_, operator.or_, operator.not_, operator.is_}
"""Their underscore only keeps them apart from keywords."""


def writes(node: fx.Node) -> bool:
    """Whether a node may change a tensor that others see."""
    target = node.target
    if node.op == "call_method":
        return target in _WRITING_METHODS or (str(target).endswith("_") and not str(target).endswith("__"))
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, overload)._schema.is_mutable for overload in target.overloads())
    name = getattr(target, "__name__", "")
    return (
        target in _WRITES
        or (name.endswith("_") and not name.endswith("__") and target not in _NAMED_LIKE_WRITES)
        or node.kwargs.get("out") is not None
        or _is_asked_to_write(node)
        or isinstance(target, torch._ops.HigherOrderOperator)
    )


def _is_asked_to_write(node: fx.Node) -> bool:
    """Whether a function that takes `inplace`, by keyword or by position, was given it."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    try:
        place = list(inspect.signature(node.target).parameters).index("inplace")  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin, or a function without such a parameter
        return False
    return place < len(node.args) and node.args[place] is not False


def written_meanwhile(span: Iterable[fx.Node], last: fx.Node) -> fx.Node | None:
    """A node outside of `span` that writes in place between the first node of `span` and `last`, or None.

    The op reads its operands where the attention ends.
    """
    missing = set(span)
    node = last
    while missing:
        node = node.prev
        if node in missing:
            missing.discard(node)
        elif writes(node):
            return node
    return None


def switches_gradients(first: fx.Node, last: fx.Node) -> bool:
    """Whether they are switched on or off between two nodes: what was detached at `first` may not be at `last`."""
    node = first
    while node is not last:
        node = node.next
        if node.target is torch._C._set_grad_enabled:
            return True
    return False
