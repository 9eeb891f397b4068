"""Which nodes may change a tensor that others see."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture
from torch import Tensor, fx

from lite_compile.passes.writes import writes

X = torch.ones(3, 4)


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
