"""A linear layer and the GELU of its result become one op, `lite_compile::linear_gelu`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, is_below, special_kind
from .planned_nodes import copy_origin
from .pointwise_steps import is_dense
from .writes import switches_gradients, written_meanwhile

LEAST_ELEMENTS = 1 << 24
"""From how many elements of the result on the op pays."""
_LINEAR, _GELU = {F.linear, torch._C._nn.linear}, {F.gelu, torch._C._nn.gelu}


def fuse_gelu(gm: fx.GraphModule, device: torch.device, least_elements: int | None = None) -> int:
    """Replace each linear layer on `device` whose result goes into GELU alone, by the tanh formula, in 16 bits.

    Args:
        least_elements: from how many elements of the result on, `LEAST_ELEMENTS` unless given.

    Returns:
        How many were replaced.
    """
    from .. import linear_op  # noqa: F401  (registers linear_gelu)

    least = LEAST_ELEMENTS if least_elements is None else least_elements
    fused = 0
    for linear in list(gm.graph.nodes):
        gelu = _gelu_of(linear)
        if gelu is None:
            continue
        operands = _operands(linear, gelu, device, least)
        if operands is None:
            continue
        with gm.graph.inserting_before(gelu):
            made = gm.graph.call_function(torch.ops.lite_compile.linear_gelu.default, operands)
        made.meta["example_value"] = gelu.meta["example_value"]
        copy_origin(gelu, made)
        gelu.replace_all_uses_with(made)
        gm.graph.erase_node(gelu)
        gm.graph.erase_node(linear)
        fused += 1
    return fused


def _linear(input: Any, weight: Any, bias: Any = None) -> None:
    """Signature of `torch.nn.functional.linear`."""


def _gelu(input: Any, approximate: Any = "none") -> None:
    """Signature of `torch.nn.functional.gelu`."""


def _gelu_of(linear: fx.Node) -> fx.Node | None:
    """What reads a linear layer's result, if that is GELU by the tanh formula and nothing else."""
    if linear.target not in _LINEAR or len(linear.users) != 1 or "out" in linear.kwargs:
        return None
    user = next(iter(linear.users))
    if user.target not in _GELU:
        return None
    bound = inspect.signature(_gelu).bind(*user.args, **user.kwargs).arguments
    return user if bound["input"] is linear and bound.get("approximate") == "tanh" else None


def _operands(
    linear: fx.Node, gelu: fx.Node, device: torch.device, least: int
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, weight and bias, if they are what the op takes and are as they were when the GELU reads the result."""
    bound = inspect.signature(_linear).bind(*linear.args, **linear.kwargs).arguments
    nodes: tuple[Any, Any, Any] = (bound["input"], bound["weight"], bound.get("bias"))
    fakes = [fake_tensor(node) for node in (*nodes, gelu)]
    if any(fake is None or special_kind(fake) for fake in fakes):
        return None
    x, weight, bias, out = (fake for fake in fakes if fake is not None)
    same = {(fake.dtype, fake.device) for fake in (x, weight, bias, out)}
    if same != {(out.dtype, device)} or out.dtype not in (torch.float16, torch.bfloat16) or out.requires_grad:
        return None
    if x.dim() < 2 or weight.dim() != 2 or not all(map(is_dense, (x, weight, bias, out))):
        return None
    if bias.dim() != 1 or not statically_known_true(bias.shape[0] == weight.shape[0]):  # torch adds others as well
        return None
    if is_below(out.numel(), least):
        return None
    if written_meanwhile([linear], gelu) is not None or switches_gradients(linear, gelu):
        return None
    return nodes
