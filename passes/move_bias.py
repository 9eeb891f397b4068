"""The bias of a linear layer is added by the op of ours that reads the product, in registers.

There it costs nothing that can be measured, and the matrix library is 1 to 2 % quicker without it
(`benchmarks/LOG.md`, 2026-11-27).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor
from .match_linear import Linear, match_linear
from .planned_nodes import copy_origin
from .pointwise_steps import VIEWS, cast_of, dropout_of
from .writes import switches_gradients, written_meanwhile


def move_bias(gm: fx.GraphModule) -> int:
    """Move the biases of the layers whose products go into `add_normalize` or `normalize_rotate` alone.

    Returns:
        How many were moved.
    """
    from .. import layer_norm_op, rotary_op  # noqa: F401  (register the ops; need Triton)

    # Which argument is the product, over how many of its last dimensions the channels lie, and where the bias goes.
    readers = {
        torch.ops.lite_compile.add_normalize.default: ("y", 1, "y_bias"),
        torch.ops.lite_compile.normalize_rotate.default: ("x", 2, "x_bias"),
    }
    moved = 0
    for op in list(gm.graph.nodes):
        if op.target not in readers:
            continue
        name, channel_dims, bias_name = readers[op.target]
        place = [argument.name for argument in op.target._schema.arguments].index(name)
        product = op.args[place] if place < len(op.args) else op.kwargs[name]
        span = _handed_on(product, op) if [*op.args, *op.kwargs.values()].count(product) == 1 else []
        layer = match_linear(span[-1]) if span else None
        if layer is not None and _may_move(layer, span, op, channel_dims):
            _replace(span[-1], layer)
            op.kwargs = {**op.kwargs, bias_name: layer.bias}
            moved += 1
    return moved


def _handed_on(product: Any, reader: fx.Node) -> list[fx.Node]:
    """`product` and what it stands for, from the reader upwards; each is read by the one before alone."""
    span: list[fx.Node] = []
    while isinstance(product, fx.Node) and list(product.users) == [reader]:
        span.append(product)
        product, reader = _source(product), product
    return span


def _source(node: fx.Node) -> fx.Node | None:
    """What `node` hands on as it is, but for its shape: by a view, a cast to the same dtype, a dropout that is off."""
    source: Any = cast_of(node)
    if source is None and node.target in VIEWS and node.args:
        source = node.args[0]
    if source is None:
        dropout = dropout_of(node)
        source = dropout[0] if dropout is not None and dropout[1] == 0 else None
    before, after = fake_tensor(source), fake_tensor(node)
    if not isinstance(source, fx.Node) or before is None or after is None:
        return None
    return source if before.dtype is after.dtype and before.device == after.device else None


def _may_move(layer: Linear, span: list[fx.Node], op: fx.Node, channel_dims: int) -> bool:
    """Whether the op's channels are the layer's, and what the op would read is still what the layer would have read."""
    product, bias = fake_tensor(span[0]), fake_tensor(layer.bias)
    if product is None or bias is None:
        return False
    if not statically_known_true(product.shape[-channel_dims:].numel() == bias.shape[0]):
        return False
    return written_meanwhile(span, op) is None and not switches_gradients(span[-1], op)


def _replace(linear: fx.Node, layer: Linear) -> None:
    with linear.graph.inserting_before(linear):
        made = linear.graph.call_function(torch.nn.functional.linear, (layer.x, layer.weight))
    made.meta["example_value"] = linear.meta["example_value"]
    copy_origin(linear, made)
    linear.replace_all_uses_with(made)
    linear.graph.erase_node(linear)
