"""Nodes that are planned first and emitted later."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Denoiser, capture, inputs
from torch import fx

from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.graph_inputs import fake_tensor
from lite_compile.passes.planned_nodes import emit, plan
from lite_compile.passes.trace_projections import trace_projections


@pytest.fixture
def site_of_sdpa() -> tuple[fx.GraphModule, fx.Node]:
    gm = capture(Denoiser(), *inputs())
    (site,) = find_attention(gm)
    return gm, site.node


def test_planning_computes_values_and_leaves_the_graph(site_of_sdpa: tuple[fx.GraphModule, fx.Node]) -> None:
    gm, node = site_of_sdpa
    before, users = gm.code, dict(node.users)
    pair = plan("split", plan("transpose", node, 1, 2), [16, 48], dim=1)
    part = plan(operator.getitem, pair, 1)
    value = fake_tensor(part)
    assert value is not None
    assert tuple(value.shape) == (1, 48, 2, 16)
    assert part.all_input_nodes == [pair]
    gm.recompile()
    assert (gm.code, node.users) == (before, users)


def test_a_planned_node_is_emitted_once(site_of_sdpa: tuple[fx.GraphModule, fx.Node]) -> None:
    gm, node = site_of_sdpa
    count = len(gm.graph.nodes)
    shared = plan("neg", node)
    both = plan(torch.add, shared, plan(torch.mul, shared, 2.0), alpha=2)
    emitted: dict[object, fx.Node] = {}
    with gm.graph.inserting_before(node.next):
        first, number, same = emit(gm.graph, (both, 3, node), emitted, like=node)
        again = emit(gm.graph, both, emitted, like=node)
    assert again is first
    assert (number, same) == (3, node)
    assert len(gm.graph.nodes) == count + 3
    assert first.kwargs == {"alpha": 2}
    assert first.meta["nn_module_stack"] == node.meta["nn_module_stack"]
    assert fake_tensor(first).shape == fake_tensor(node).shape  # type: ignore[union-attr]
    gm.graph.lint()


def test_what_took_the_place_of_a_node_is_used(site_of_sdpa: tuple[fx.GraphModule, fx.Node]) -> None:
    gm, node = site_of_sdpa
    other = node.args[0]
    with gm.graph.inserting_after(node):
        emitted = emit(gm.graph, plan("neg", node), {node: other}, like=node)
    assert emitted.args == (other,)


def test_planned_projections_are_traced(site_of_sdpa: tuple[fx.GraphModule, fx.Node]) -> None:
    gm, _ = site_of_sdpa
    (linear, *_) = gm.graph.find_nodes(op="call_function", target=torch._C._nn.linear)
    x, weight, _ = linear.args
    planned = plan("unflatten", plan(F.linear, x, plan(operator.getitem, weight, slice(0, 16)), None), -1, (2, 8))
    (projection,) = trace_projections(planned)
    assert projection.activation is trace_projections(linear)[0].activation
    assert projection.weight is weight
    assert not fake_tensor(planned).requires_grad  # type: ignore[union-attr]
