from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from graphs import DIM, Denoiser, capture, inputs
from torch import Tensor, fx, nn

from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.graph_inputs import source_name
from lite_compile.passes.trace_projections import is_product, same_source, trace_projections


def test_projections_of_separate_linears() -> None:
    (site,) = find_attention(capture(Denoiser(), *inputs()))
    q, k, v = (trace_projections(node) for node in (site.q, site.k, site.v))
    assert [len(p) for p in (q, k, v)] == [1, 1, 1]
    assert "'to_q'" in source_name(q[0].weight)
    assert same_source(q, k)
    assert same_source(q, v)


def test_cross_attention_has_another_source() -> None:
    sites = find_attention(capture(Denoiser(cross=True), *inputs()))
    q, k = (trace_projections(node) for node in (sites[1].q, sites[1].k))
    assert not same_source(q, k)


def test_norms_rotations_and_casts_are_walked_through() -> None:
    norm = nn.RMSNorm(DIM // 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = norm(q).float() * 0.5 + q.roll(1, -1)
        return nn.functional.scaled_dot_product_attention(q.to(k.dtype), k, v)

    (site,) = find_attention(capture(Denoiser(attend), *inputs()))
    (projection,) = trace_projections(site.q)
    assert "'to_q'" in source_name(projection.weight)


def test_nothing_to_find() -> None:
    assert trace_projections(None) == []
    gm = capture(lambda q: nn.functional.scaled_dot_product_attention(q, q, q), inputs()[0][None])
    (site,) = find_attention(gm)
    assert trace_projections(site.q) == []


PRODUCTS = [
    nn.functional.linear, operator.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.conv3d,
    torch.tensordot, torch.ops.aten.convolution.default, torch.ops.aten._weight_int8pack_mm, torch.ops.aten._scaled_mm,
    torch.ops.aten._int_mm.default, "matmul", "__matmul__", "addmm",
]  # fmt: skip
OTHERS = [
    nn.functional.layer_norm, nn.functional.rms_norm, torch.addcmul, operator.mul, torch.lgamma, torch.igamma,
    torch.ops.prims.convert_element_type.default, operator.getitem, torch.cat, torch.lerp, "mul", "to", "view",
]  # fmt: skip


@pytest.mark.parametrize(("targets", "expected"), [(PRODUCTS, True), (OTHERS, False)], ids=["products", "others"])
def test_products_are_known_by_name(targets: list[Any], expected: bool) -> None:
    graph = fx.Graph()
    for target in targets:
        create = graph.call_method if isinstance(target, str) else graph.call_function
        assert is_product(create(target)) == expected, target
    assert not is_product(graph.placeholder("linear"))


@pytest.mark.parametrize(
    "name", ["int8_linear", "gemm_forward", "gemv_4bit", "fp8_matmul", "qlinear", "linear_dynamic"]
)
def test_custom_products_are_known_by_a_word_of_their_name(name: str) -> None:
    def product() -> None: ...

    product.__name__ = name
    assert is_product(fx.Graph().call_function(product))
