"""`explain`: what the backend would do with a model, without running it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx

from .backend import rewrite_graph
from .decisions import GraphReport, Report
from .options import Options
from .passes.graph_inputs import fake_value, placeholders
from .runtime import SizeResolver

_numbers = itertools.count()


def explain(
    model: Callable[..., Any], *args: Any, backend_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Capture `model(*args, **kwargs)` under `torch.no_grad()` and decide about its attention; no tensor is computed.

    Each captured graph returns uninitialised outputs of the right shape, so that Python code between two graphs goes
    on, and does to Python objects what it does in any call. Nothing else is remembered: `report()` and later
    compilations are as if `explain` had not been called.

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
    function = original.forward if isinstance(original, torch.nn.Module) else original
    with torch.no_grad():
        torch.compile(_with_own_code(function), backend=capture)(*args, **kwargs)
    return Report(tuple(graphs))


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
    sizes = [tuple(tensor.shape) for tensor in tensors]
    resolver = SizeResolver(inputs)
    positions = {node: index for index, node in enumerate(inputs)}

    def call(*args: Any) -> tuple[Any, ...]:
        shapes = iter(resolver.resolve(sizes, args))
        results = []
        for node, value in zip(outputs, values, strict=True):
            if isinstance(value, torch.Tensor):
                shape = next(shapes)
                given = args[positions[node]] if node in positions else None
                results.append(torch.empty(shape, dtype=value.dtype, device=value.device) if given is None else given)
            elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                results.append(value.node.hint)
            else:
                results.append(value)
        return tuple(results)

    return call
