"""`explain`: what the backend would do with a model, without running it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_nested_int

from .backend import rewrite_graph
from .decisions import GraphReport, Report
from .options import Options
from .passes.graph_inputs import fake_value, follow_from_inputs, placeholders
from .runtime import SizeResolver

_numbers = itertools.count()
_UNKNOWN = 1
"""Stands for a size that data decide."""


def explain(
    model: Callable[..., Any], *args: Any, backend_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Capture `model(*args, **kwargs)` under `torch.no_grad()` and decide about its attention; no tensor is computed.

    Each captured graph returns uninitialised outputs of the right shape, so that Python code between two graphs goes
    on, and does to Python objects what it does in any call, hooks of the model included. Nothing else is remembered:
    `report()` and later compilations are as if `explain` had not been called. A model whose blocks are compiled one by
    one is explained as if it were compiled whole, where none stays dense because of its launches.

    Args:
        model: a module or function, compiled or not.
        backend_options: the options that `torch.compile` would be given.

    Raises:
        OptionValueError, OptionTypeError: an option is unknown or wrong.
    """
    settings = Options.parse(backend_options)
    graphs: list[GraphReport] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(rewrite_graph(gm, settings)[2])
        return _empty_outputs(gm)

    if not callable(model):
        raise TypeError(f"model is {model!r} ({type(model).__name__}); allowed: a torch.nn.Module or a function")
    original = getattr(model, "_orig_mod", model)
    with torch.no_grad(), _entry(original) as entry:
        torch.compile(entry, backend=capture)(*args, **kwargs)
    return Report(tuple(graphs))


@contextmanager
def _entry(original: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """What to capture: a function under a name of its own, or a module whose `forward` has one meanwhile.

    The call of a module runs its hooks around `forward`. One compiled by `model.compile()` would run what it compiled.
    """
    if not isinstance(original, torch.nn.Module):
        yield _with_own_code(original)
        return
    own = vars(original).get("forward")
    object.__setattr__(original, "forward", _with_own_code(original.forward))
    try:
        yield original if original._compiled_call_impl is None else original._call_impl
    finally:
        object.__delattr__(original, "forward")
        if own is not None:
            object.__setattr__(original, "forward", own)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function`: Dynamo keeps its caches, limits and guesses about dynamic sizes by code object and name."""
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, FunctionType):
        return function
    code = inner.__code__.replace(co_name=f"explain_{next(_numbers)}")
    copy = FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy if inner is function else MethodType(copy, function.__self__)  # type: ignore[attr-defined]


def _empty_outputs(gm: fx.GraphModule) -> Callable[..., Any]:
    """A stand-in for the compiled graph: outputs of the right shapes, and nothing computed."""
    inputs = placeholders(gm.graph)
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, list | tuple)
    values = [fake_value(node) if isinstance(node, fx.Node) else node for node in outputs]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    sizes = [tuple(_if_known(size, gm.graph) for size in tensor.shape) for tensor in tensors]
    resolver = SizeResolver(list(map(_without_own_sizes, inputs)))
    positions = {node: index for index, node in enumerate(inputs)}

    def call(*args: Any) -> tuple[Any, ...]:
        shapes = iter(resolver.resolve(sizes, resolver.read(args)))
        results = []
        for node, value in zip(outputs, values, strict=True):
            if isinstance(value, torch.Tensor):
                shape = next(shapes)
                given = args[positions[node]] if node in positions else None
                results.append(torch.empty(shape, dtype=value.dtype, device=value.device) if given is None else given)
            elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                results.append(_UNKNOWN if value.node.hint is None else value.node.hint)
            else:
                results.append(value)
        return tuple(results)

    return call


def _if_known(size: int | torch.SymInt, graph: fx.Graph) -> int | torch.SymInt:
    return size if follow_from_inputs([size], graph) else _UNKNOWN


def _without_own_sizes(node: fx.Node) -> fx.Node:
    """`node`, or a stand-in without sizes for an input that has no integer ones (nested, or a length of one)."""
    value = fake_value(node)
    nested = (
        value.is_nested if isinstance(value, torch.Tensor) else isinstance(value, torch.SymInt) and is_nested_int(value)
    )
    return fx.Graph().placeholder(node.name) if nested else node
