from __future__ import annotations

from graphs import DIM, Denoiser, capture, inputs
from torch import Tensor, nn

from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.graph_inputs import source_name
from lite_compile.passes.trace_projections import same_source, trace_projections


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
