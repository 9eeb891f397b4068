"""Where an operand of a product can be taken from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import capture
from torch import Tensor, fx

from lite_compile.passes.graph_inputs import fake_tensor
from lite_compile.passes.trace_operand import choose_origin, trace_operand

X = torch.ones(2, 3, 5, 4)


def output(function: Callable[[Tensor], Tensor], x: Tensor = X) -> fx.Node:
    (node,) = capture(lambda x: function(x) + 1, x).graph.output_node().all_input_nodes
    result = node.args[0]
    assert isinstance(result, fx.Node)
    return result


SWAPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(-1, -2),
    "positive": lambda x: x.transpose(2, 3),
    "function": lambda x: torch.transpose(x, 3, 2),
    "swapaxes": lambda x: x.swapaxes(-2, -1),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "permute_list": lambda x: torch.permute(x, [0, 1, -1, -2]),
    "contiguous": lambda x: x.transpose(-1, -2).contiguous(),
    "three_times": lambda x: x.mT.mT.mT,
}


@pytest.mark.parametrize("name", SWAPPED)
def test_transpositions(name: str) -> None:
    node = output(SWAPPED[name])
    origin = trace_operand(node, (0, 1, 3, 2), node, scaled=True)[-1]
    assert origin.node.op == "placeholder"
    assert origin.planned() is origin.node
    assert origin.factor == 1.0


def test_scales_and_upcasts() -> None:
    node = output(lambda x: 0.5 * (x.float() * 4 / 8).mT, X.bfloat16())
    origins = trace_operand(node, (0, 1, 3, 2), node, scaled=True)
    assert (origins[-1].node.op, origins[-1].factor) == ("placeholder", 0.25)
    assert len(origins[-1].passed) == 5
    assert trace_operand(node, (0, 1, 3, 2), node, scaled=False) == origins[:1]
    chosen = [choose_origin(origins, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    assert [chosen[0] is origins[-1], chosen[2]] == [True, None]
    assert chosen[1] is not None
    assert chosen[1].node.target == "float"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x * x.mean(),
        lambda x: x.mul_(2.0),
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda x: x + 1.0,
        lambda x: x[None],
    ],
)
def test_where_it_stops(function: Callable[[Tensor], Tensor]) -> None:
    node = output(function)
    origins = trace_operand(node, range(4), node, scaled=True)
    assert [origin.node for origin in origins] == [node]


def test_an_origin_that_needs_a_permutation_plans_it() -> None:
    node = output(lambda x: x.permute(2, 0, 1, 3) * 2.0)
    origins = trace_operand(node, (1, 2, 0, 3), node, scaled=True)
    assert [origin.dims for origin in origins] == [(1, 2, 0, 3), (1, 2, 0, 3), (0, 1, 2, 3)]
    planned = origins[0].planned()
    value = fake_tensor(planned)
    assert value is not None
    assert value.shape == X.shape
    assert choose_origin(origins, torch.float32) is origins[-1]


def test_what_autocast_casts_comes_first() -> None:
    node = output(lambda x: x.mT.contiguous())
    product = output(lambda x: x.half())
    cast, *others = trace_operand(node, range(4), product, scaled=True)
    assert others == trace_operand(node, range(4), node, scaled=True)
    assert choose_origin([cast, *others], torch.float16) is cast
    value = fake_tensor(cast.planned())
    assert value is not None
    assert (value.dtype, value.shape) == (torch.float16, fake_tensor(node).shape)  # type: ignore[union-attr]
