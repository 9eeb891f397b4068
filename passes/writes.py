"""What happens between two nodes of a graph: writes in place, and gradients switched on or off."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_WRITES = {
    operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift,
}  # fmt: skip
_WRITING_METHODS = {f"__{function.__name__}__" for function in _WRITES}
_NAMED_LIKE_WRITES = {operator.and_, operator.or_, operator.not_, operator.is_}
"""Their underscore only keeps them apart from keywords."""
_UPDATES = {
    torch.native_batch_norm, torch._batch_norm_impl_index, torch.cudnn_batch_norm, torch.miopen_batch_norm,
    torch.batch_norm_update_stats, torch.fused_moving_avg_obs_fake_quant,
}  # fmt: skip
"""Builtins that update statistics, if they are given any."""
_BUILTIN_NORM = ("input", "weight", "bias", "running_mean", "running_var")
_PARAMETERS: dict[Any, tuple[str, ...]] = {
    torch.batch_norm: (*_BUILTIN_NORM, "training"), torch.instance_norm: (*_BUILTIN_NORM, "use_input_stats"),
}  # fmt: skip
"""Of functions that do not say themselves."""
_ASKED_BY: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("running_mean", "training"), torch.batch_norm: ("running_mean", "training"),
    F.instance_norm: ("running_mean", "use_input_stats"), torch.instance_norm: ("running_mean", "use_input_stats"),
    F.embedding: ("max_norm",), F.embedding_bag: ("max_norm",),
}  # fmt: skip
"""What has to be given, and not False, to functions that write then. Others: `inplace`."""
_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
}


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
        or target in _UPDATES
        or (name.endswith("_") and not name.endswith("__") and target not in _NAMED_LIKE_WRITES)
        or node.kwargs.get("out") is not None
        or _is_asked_to_write(node)
        or isinstance(target, torch._ops.HigherOrderOperator)
    )


def _is_asked_to_write(node: fx.Node) -> bool:
    """Whether a function that writes only if asked to was asked, by keyword, by position or by default."""
    arguments = [_argument(node, name) for name in _ASKED_BY.get(node.target, ("inplace",))]
    return all(argument is not None and argument is not False for argument in arguments)


def _argument(node: fx.Node, name: str) -> object:
    """What a function is given for one of its parameters; None if it has no such parameter."""
    if name in node.kwargs:
        return node.kwargs[name]
    defaults: dict[str, Any] = dict.fromkeys(_PARAMETERS.get(node.target, ()))
    if not defaults:
        try:
            parameters = inspect.signature(node.target).parameters  # type: ignore[arg-type]
        except (TypeError, ValueError):  # a builtin
            return None
        defaults = {parameter: value.default for parameter, value in parameters.items()}
    given: dict[str, object] = {**defaults, **dict(zip(defaults, node.args, strict=False))}
    return given.get(name)


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
    """Whether they, or inference mode, are switched between nodes: what is detached at `first` may not be at `last`."""
    node = first
    while node is not last:
        node = node.next
        if node.target in _SWITCHES:
            return True
    return False
