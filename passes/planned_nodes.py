"""Nodes that a rewrite would add: their values can be asked for before the graph is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class PlannedNode:
    """A call that is not in any graph yet. It reads like an `fx.Node`: `op`, `target`, `args`, `meta`, inputs.

    Equality is identity: a planned node used twice is emitted once.
    """

    def __init__(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: object) -> None:
        self.op, self.target, self.args, self.kwargs = op, target, args, kwargs
        self.meta = {"example_value": value}

    @property
    def all_input_nodes(self) -> list[fx.Node | PlannedNode]:
        found: dict[fx.Node | PlannedNode, None] = {}
        _map((self.args, self.kwargs), lambda operand: found.setdefault(operand))
        return list(found)


Operand = fx.Node | PlannedNode


def plan(target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> PlannedNode:
    """A planned call of a function, or of the method `target` of its first argument; its value is computed on fakes."""
    op = "call_method" if isinstance(target, str) else "call_function"
    fakes, fake_kwargs = _map((args, kwargs), lambda operand: operand.meta["example_value"])
    with torch.no_grad():
        if isinstance(target, str):
            value = getattr(fakes[0], target)(*fakes[1:], **fake_kwargs)
        else:
            value = target(*fakes, **fake_kwargs)
    return PlannedNode(op, target, args, kwargs, value)


def planned_result(value: torch.Tensor) -> PlannedNode:
    """Stands for a result of which only the fake value is known, to see what becomes of it."""
    return PlannedNode("placeholder", "result", (), {}, value)


def emit(graph: fx.Graph, operand: Any, emitted: dict[Any, fx.Node], like: fx.Node) -> Any:
    """The node of `graph` that computes `operand`, made at the graph's insertion point unless there is one.

    Args:
        emitted: what earlier calls made, and what took the place of nodes that are gone.
        like: node whose module and stack trace the new nodes get.
    """

    def make(operand: Operand) -> fx.Node:
        if operand in emitted:
            return emitted[operand]
        if isinstance(operand, fx.Node):
            return operand
        args, kwargs = _map((operand.args, operand.kwargs), make)
        node = graph.create_node(operand.op, operand.target, args, kwargs)
        node.meta.update(operand.meta)
        copy_origin(like, node)
        emitted[operand] = node
        return node

    return _map(operand, make)


def copy_origin(source: fx.Node, node: fx.Node) -> None:
    """Give `node` the module and the stack trace of `source`."""
    node.meta.update(
        {key: source.meta[key] for key in ("stack_trace", "nn_module_stack", "source_fn_stack") if key in source.meta}
    )


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to all operands in nested arguments."""
    if isinstance(value, fx.Node | PlannedNode):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_map(item, function) for item in (value.start, value.stop, value.step)))
    return value
