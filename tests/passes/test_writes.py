"""Which nodes may change a tensor that others see, and between which ones gradients are switched."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture
from torch import Tensor, fx

from lite_compile.passes.writes import switches_gradients, writes

X, MEAN, PLANE_MEAN = torch.ones(3, 4), torch.ones(4), torch.ones(3)


def set_a_row(x: Tensor) -> None:
    x[0] = 1.0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.add_(1.0), True),
        (set_a_row, True),
        (lambda x: operator.iadd(x, 1.0), True),
        (lambda x: torch.relu_(x), True),
        (lambda x: torch.add(x, 1.0, out=torch.empty(3, 4)), True),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: F.relu(x, True), True),
        (lambda x: F.dropout(x, 0.5, False, True), True),
        (lambda x: torch.ops.aten.add_.Tensor(x, x), True),
        (lambda x: torch.ops.aten.add_(x, x), True),
        (lambda x: F.batch_norm(x, MEAN, MEAN, training=True), True),
        (lambda x: F.batch_norm(x, MEAN, MEAN, None, None, True), True),
        (lambda x: torch.batch_norm(x, None, None, MEAN, MEAN, True, 0.1, 1e-5, True), True),
        (lambda x: F.instance_norm(x[None], PLANE_MEAN, PLANE_MEAN), True),
        (lambda x: torch.instance_norm(x[None], None, None, PLANE_MEAN, PLANE_MEAN, True, 0.1, 1e-5, True), True),
        (lambda x: F.embedding(torch.tensor([1]), x, max_norm=1.0), True),
        (lambda x: F.embedding(torch.tensor([1]), x, None, 1.0), True),
        (lambda x: F.embedding(torch.tensor([1]), x, max_norm=0.0), True),
        (lambda x: torch.native_batch_norm(x, None, None, MEAN, MEAN, True, 0.1, 1e-5), True),
        (lambda x: F.embedding_bag(torch.tensor([[1]]), x, max_norm=1.0), True),
        (lambda x: F.batch_norm(x, MEAN, MEAN), False),
        (lambda x: F.batch_norm(x, None, None, training=True), False),
        (lambda x: torch.batch_norm(x, None, None, MEAN, MEAN, False, 0.1, 1e-5, True), False),
        (lambda x: F.instance_norm(x[None]), False),
        (lambda x: F.instance_norm(x[None], PLANE_MEAN, PLANE_MEAN, use_input_stats=False), False),
        (lambda x: F.embedding(torch.tensor([1]), x), False),
        (lambda x: F.dropout(x, 0.5, True), False),
        (lambda x: x.add(1.0), False),
        (lambda x: ~(x > 0), False),
        (lambda x: (x > 0) | (x < -1), False),
        (lambda x: (x > 0) & (x < 1), False),
        (lambda x: x[torch.tensor(1) : 3], False),
        (lambda x: torch.relu(x), False),
        (lambda x: F.relu(x, False), False),
        (lambda x: F.leaky_relu(x, 1), False),
        (lambda x: torch.ops.aten.add.Tensor(x, x), False),
    ],
)
def test_writes(function: Callable[[Tensor], Any], expected: bool) -> None:
    def returning(x: Tensor) -> Any:
        y = x.clone()
        return function(y), y

    nodes: list[fx.Node] = list(capture(returning, X).graph.nodes)
    assert any(map(writes, nodes)) is expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(torch.no_grad, True), (torch.enable_grad, True), (torch.inference_mode, True), (None, False)],
)
@pytest.mark.parametrize("inside", ["first", "last"])
def test_switches_gradients(mode: Callable[[], Any] | None, expected: bool, inside: str) -> None:
    """Between a sine and a cosine of which one is computed in another mode than the rest of the graph."""

    def sine_of_cosine(x: Tensor) -> Tensor:
        with mode() if mode is not None and inside == "first" else nullcontext():
            y = x.cos()
        with mode() if mode is not None and inside == "last" else nullcontext():
            return y.sin() + 1.0

    graph = capture(sine_of_cosine, X, grad=mode is torch.no_grad).graph
    cosine, sine, added = (
        next(node for node in graph.nodes if node.target == target) for target in ("cos", "sin", operator.add)
    )
    assert switches_gradients(cosine, sine) is expected
    assert not switches_gradients(sine, added)
