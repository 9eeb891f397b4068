"""Products and the labels of their dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import capture
from torch import Tensor

from lite_compile.passes.trace_product import Product, as_product

A, B = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 4, 7)


def products(function: Callable[..., Any], *args: Tensor) -> list[Product]:
    gm = capture(function, *args)
    return [product for node in gm.graph.nodes if (product := as_product(node)) is not None]


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "operator": lambda a, b: a @ b,
    "method": lambda a, b: a.matmul(b),
    "function": lambda a, b: torch.matmul(a, b),
    "aten": lambda a, b: torch.ops.aten.matmul.default(a, b),
    "einsum": lambda a, b: torch.einsum("abij, abjk -> abik", a, b),
    "einsum_of_list": lambda a, b: torch.einsum("abij,abjk->abik", [a, b]),
    "ellipsis": lambda a, b: torch.einsum("...ij,...jk->...ik", a, b),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_product(name: str) -> None:
    (product,) = products(SPELLINGS[name], A, B)
    assert [node.op for node in (product.left, product.right)] == ["placeholder", "placeholder"]
    left, right, out = product.left_labels, product.right_labels, product.labels
    assert left[:2] == right[:2] == out[:2]
    assert (left[2], left[3], right[3]) == (out[2], right[2], out[3])
    assert len({*left, *right}) == 5


@pytest.mark.parametrize("name", ["bmm", "bmm_method", "baddbmm"])
def test_products_of_three_dimensions(name: str) -> None:
    calls: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "bmm": torch.bmm,
        "bmm_method": lambda a, b: a.bmm(b),
        "baddbmm": lambda a, b: torch.baddbmm(a.new_ones(1), a, b),
    }
    (product,) = products(calls[name], A[0], B[0])
    assert product.labels == (0, "row", "column")


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.5, 0), (2, 3)])
def test_baddbmm(alpha: float, beta: float) -> None:
    def add(a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(a.new_ones(3, 5, 7), a, b, alpha=alpha, beta=beta)

    (product,) = products(add, A[0], B[0])
    assert (product.alpha, product.beta) == (alpha, beta)
    assert (product.added is None) == (beta == 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.einsum("abij,abjk", a, b),  # the result's labels are left to alphabetical order
        lambda a, b: torch.einsum("aaij,aajk->ik", a[:1, :1], b[:1, :1]),
        lambda a, b: torch.einsum("abij,abjk,abik->a", a, b, a.sum(-1, keepdim=True).expand(2, 3, 5, 7)),
        lambda a, b: torch.einsum("abij->abji", a),
        lambda a, b: a[0, 0] @ b,
        lambda a, b: a @ b[0, 0, :, 0],
        lambda a, b: a * b.mT[:, :, :5],
    ],
)
def test_what_is_no_product_of_two_equals(function: Callable[..., Any]) -> None:
    assert products(function, A, B) == []
