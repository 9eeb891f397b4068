"""A linear layer of plain tensors of one dtype."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, special_kind
from .pointwise_steps import is_dense

_LINEAR = {F.linear, torch._C._nn.linear}


class Linear(NamedTuple):
    """`x @ weight^T + bias`."""

    x: fx.Node
    """`[..., K]`."""
    weight: fx.Node
    """`[N, K]`."""
    bias: fx.Node
    """`[N]`."""


def match_linear(node: fx.Node) -> Linear | None:
    """The layer that `node` computes, if it has a bias, needs no gradients, and all is dense, of one dtype and device.

    So autocast, which casts what the layer is given, is not in force.
    """
    if node.target not in _LINEAR:
        return None
    bound = inspect.signature(_linear).bind(*node.args, **node.kwargs).arguments
    operands = Linear(bound["input"], bound["weight"], bound.get("bias"))  # type: ignore[arg-type]
    fakes = [fake_tensor(operand) for operand in (*operands, node)]
    if any(fake is None or special_kind(fake) or not is_dense(fake) for fake in fakes):
        return None
    x, weight, bias, out = (fake for fake in fakes if fake is not None)
    if any((fake.dtype, fake.device) != (out.dtype, out.device) for fake in (x, weight, bias)) or out.requires_grad:
        return None
    # torch adds other biases as well
    is_per_channel = bias.dim() == 1 and statically_known_true(bias.shape[0] == weight.shape[0])
    return operands if x.dim() >= 2 and weight.dim() == 2 and is_per_channel else None


def _linear(input: Any, weight: Any, bias: Any = None) -> None:
    """Signature of `torch.nn.functional.linear`."""
