"""Zeros that are zero, and nodes that write."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import capture
from torch import Tensor

from lite_compile.passes.pointwise_steps import is_zero

X = torch.ones(3, 4)


def term(function: Callable[[Tensor], Any]) -> Any:
    """What `function` adds to its argument."""
    (node,) = capture(function, X).graph.find_nodes(op="call_function", target=operator.add)
    return node.args[1]


def filled(x: Tensor) -> Tensor:
    zeros = torch.zeros(3, 4)
    zeros[0] = 1.0
    return x + zeros


def filled_through_view(x: Tensor) -> Tensor:
    zeros = torch.zeros(3, 4)
    zeros[0].view(4).fill_(1.0)
    return x + zeros


def given_away(x: Tensor) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(3, 4)
    return x + zeros, zeros


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 0.0, True),
        (lambda x: x + torch.zeros(4), True),
        (lambda x: x + torch.zeros_like(x), True),
        (lambda x: x + x.new_zeros(1).expand(3, 4).to(x.dtype)[:, None, 0], True),
        (lambda x: x + 1e-30, False),
        (lambda x: x + torch.ones(4), False),
        (lambda x: x + torch.zeros(4).cos(), False),
        (lambda x: x + x, False),
        (lambda x: x + 0 * x, False),
        (filled, False),
        (filled_through_view, False),
        (given_away, False),
    ],
)
def test_zeros(function: Callable[[Tensor], Any], expected: bool) -> None:
    assert is_zero(term(function)) is expected
