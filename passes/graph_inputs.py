"""Inputs of a Dynamo graph: what each one is, and how another one is appended."""

from __future__ import annotations

import re
from collections.abc import Iterable

import sympy
import torch
from torch import fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .planned_nodes import Operand, PlannedNode


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in calling order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def fake_value(node: Operand) -> object:
    """The fake tensor (or symbol) that Dynamo computed for `node`, or that `plan` did."""
    return node.meta.get("example_value")


def fake_tensor(node: object) -> torch.Tensor | None:
    """`fake_value` where it is a tensor."""
    value = fake_value(node) if isinstance(node, fx.Node | PlannedNode) else None
    return value if isinstance(value, torch.Tensor) else None


def storages(node: Operand) -> set[int]:
    """What memory the results of a node lie in; views lie in that of their base."""
    tensors = (x for x in tree_leaves(fake_value(node)) if isinstance(x, torch.Tensor))
    return {_without_transforms(x).untyped_storage()._cdata for x in tensors}


def _without_transforms(x: torch.Tensor) -> torch.Tensor:
    """What the transforms of torch.func, such as vmap, have wrapped."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode that the fake values of a graph were made in."""
    mode = next((value.fake_mode for n in gm.graph.nodes if isinstance(value := fake_value(n), FakeTensor)), None)
    assert mode is not None
    return mode


def size_hint(size: int | torch.SymInt) -> int | None:
    """What a size was when the graph was captured; None if it depends on data, so that nobody knows."""
    if isinstance(size, int):
        return size
    return None if free_unbacked_symbols(size) else int(size.node.hint)


def known_size(size: int | torch.SymInt) -> int | None:
    """A size that is a number, or a symbol of which the graph's guards have made one."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def follow_from_inputs(sizes: Iterable[int | torch.SymInt], graph: fx.Graph) -> bool:
    """Whether `sizes` can be computed before the graph runs: from sizes of its inputs, not from what they hold."""
    wanted = set[sympy.Symbol]().union(*(free_symbols(size) for size in sizes if isinstance(size, torch.SymInt)))
    if not wanted:
        return True
    given = set[object]()
    for value in map(fake_value, placeholders(graph)):
        found = value.shape if isinstance(value, torch.Tensor) else (value,)
        given.update(size.node.expr for size in found if isinstance(size, torch.SymInt))
    return wanted <= given


def is_sized(value: torch.Tensor) -> bool:
    """Whether every size of `value` is known when the graph is captured, and none is zero."""
    return all(size_hint(size) for size in value.shape)


def is_below(size: int | torch.SymInt, least: int) -> bool:
    """Whether a size was less when the graph was captured, or depends on data. Asking adds no guard."""
    hint = size_hint(size)
    return hint is None or hint < least


NESTED = "nested tensor"


def special_kind(value: torch.Tensor) -> str:
    """What kind of tensor `value` is if its elements are not simply its storage (nested, sparse, ...); else empty."""
    if value.is_nested:
        return NESTED
    if value.layout is not torch.strided:
        return "sparse tensor"
    if value.is_quantized:
        return "quantized tensor"
    if is_functorch_wrapped_tensor(value):
        return "tensor inside of a transform of torch.func, such as vmap"
    return type(value).__name__ if is_traceable_wrapper_subclass(value) else ""


def source_name(node: fx.Node) -> str:
    """Python expression that the input came from, such as `L['kwargs']['timestep']`; empty where Dynamo keeps none."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)


def list_name(node: fx.Node) -> str:
    """Python expression of the list or tuple that the input is an entry of, `L['x']`; empty where it is in none."""
    match = re.fullmatch(r"(?!L\['args'\]\[\d+\]$)(.+)\[\d+\]", source_name(node))
    return match.group(1) if match else ""


def argument_name(node: fx.Node) -> str:
    """Name of the model argument behind an input, or behind the list it is in; empty for positional or derived ones."""
    match = re.search(r"\['(?!args')([A-Za-z_]\w*)'\](\[\d+\])*$", source_name(node))
    return match.group(1) if match else ""


def attribute_path(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules that a parameter was reached through, and its own: `attn1`, `to_q`, `weight`."""
    return tuple(re.findall(r"_(?:modules|parameters)(?:'\])?\['([^']+)'\]", source_name(node)))


def is_static(node: object) -> bool:
    """Whether a node is a parameter, a buffer or anything else that belongs to the module rather than to the call."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    if isinstance(fake_value(node), torch.nn.Parameter) or "_dynamo_static_input_type" in node.meta.get(
        "tensor_dict", {}
    ):
        return True
    return _source_of_a_module(node)


def _source_of_a_module(node: fx.Node) -> bool:
    """Whether an input came from an attribute of a module, whatever variable holds the module."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return False
    guard = source.guard_source
    return "NN_MODULE" in (guard() if callable(guard) else guard).name


def is_parameter(node: fx.Node) -> bool:
    """Whether an input is a registered parameter of a module (one that is handed over with the call is not)."""
    return "_parameters" in source_name(node)


def is_buffer(node: fx.Node) -> bool:
    """Whether an input is a registered buffer of a module."""
    return "_buffers" in source_name(node)


def real_parameters(graph: fx.Graph) -> list[torch.Tensor]:
    """The parameters and buffers that the graph is being compiled for, as far as Dynamo still knows them."""
    examples = [
        getattr(n.meta.get("grapharg"), "example", None) for n in placeholders(graph) if is_parameter(n) or is_buffer(n)
    ]
    return [example for example in examples if isinstance(example, torch.Tensor)]


def append_input(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    """Append a graph input that holds state of ours: `value` is its fake tensor.

    It is marked as Dynamo marks parameters whose address is not guarded, so that CUDA graphs treat it as static.
    """
    last = placeholders(graph)[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = LocalSource(name)
    return node


def forget_arguments(graph: fx.Graph) -> None:
    """Drop what Dynamo notes about the arguments of the first call; it also drops its own, of the original graph.

    Weak references to parameters are among it, under which modules could not move those of tensor subclasses.
    """
    for node in placeholders(graph):
        node.meta.pop("grapharg", None)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be rewritten. The fake values are shared, the sources of the inputs are kept."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for old in gm.graph.nodes:
        mapping[old] = graph.node_copy(old, mapping.__getitem__)
        if hasattr(old, "_dynamo_source"):
            mapping[old]._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    for name, value in vars(gm).items():
        if name.startswith("_param_name_to_source"):
            setattr(copy, name, value)
    return copy
