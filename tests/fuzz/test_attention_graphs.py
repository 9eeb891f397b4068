"""Random attention: what is rewritten computes what the model does, what is not is left exactly as it was."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_model import Denoiser, build, call, exactly, generate, make_inputs
from hypothesis import HealthCheck, given, settings
from plans import MIN_SEQ_LEN, SDPA, WRITTEN, Plan, allowed_decisions, plans
from torch import Tensor

import lite_compile

QUICK = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(QUICK, max_examples=500, derandomize=False)
EXAMPLES = pytest.mark.parametrize(
    "examples", [pytest.param(QUICK, id="50"), pytest.param(LONG, id="500", marks=pytest.mark.slow)]
)
TOKENS_THAT_SKIP = 200


def compiled(plan: Plan, model: Denoiser, threshold: float) -> Callable[..., Any]:
    """The model compiled anew, and an empty report."""
    torch._dynamo.reset()
    lite_compile.clear_report()
    options = {"inner": "eager", "min_seq_len": MIN_SEQ_LEN, "threshold": threshold}
    return torch.compile(model, backend="liteattention", fullgraph=True, dynamic=plan.dynamic, options=options)


def was_rewritten(plan: Plan) -> bool:
    """Whether the attention of the one graph was rewritten, if that is what the plan lets expect."""
    (graph,) = lite_compile.report().graphs
    assert len(graph.sites) == plan.layers, str(graph)
    (reason,) = {site.reason for site in graph.sites}
    assert reason in allowed_decisions(plan), str(graph)
    return reason is None


def assert_as_good(sparse: Tensor, dense: Tensor, exact: Tensor) -> None:
    """Two results are in the same place, and about as far from the exact one."""
    assert sparse.dtype == dense.dtype
    assert sparse.stride() == dense.stride()
    unit = torch.finfo(dense.dtype).eps * exact.norm()
    assert (sparse - exact).norm() <= 1.5 * (dense - exact).norm() + unit


def assert_computes_the_same(plan: Plan) -> None:
    """With nothing skipped; under dynamic shapes the graph serves another length as well."""
    model = build(plan)
    sparse_model = compiled(plan, model, -math.inf)
    for longer in (0, 9) if plan.dynamic else (0,):
        inputs = make_inputs(dataclasses.replace(plan, tokens=plan.tokens + longer))
        dense = call(plan, model, inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="error in liteattention")
            sparse = call(plan, sparse_model, inputs)
        if was_rewritten(plan):
            exact_inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
            assert_as_good(sparse, dense, call(plan, exactly(plan, model), exact_inputs))
        else:
            assert torch.equal(sparse, dense)


def density_of_second_generation(plan: Plan) -> float:
    """Part of the tiles that a second generation computes, which is one like the first of a fresh model."""
    model = build(plan)
    sparse_model = compiled(plan, model, threshold=-3.0)
    generate(plan, sparse_model, seed=1)
    second = generate(plan, sparse_model, seed=2)
    density = lite_compile.stats(model).density
    was_rewritten(plan)
    assert torch.equal(second, generate(plan, compiled(plan, build(plan), threshold=-3.0), seed=2))
    return density


def assert_generations_are_independent(plan: Plan) -> None:
    density_of_second_generation(plan)


@EXAMPLES
@pytest.mark.parametrize("products", [SDPA, WRITTEN[:2], WRITTEN[2:]], ids=["sdpa", "matmul", "bmm_and_einsum"])
def test_skipping_nothing_is_the_model_itself(products: tuple[str, ...], examples: settings) -> None:
    examples(given(plans(products))(assert_computes_the_same))()


@EXAMPLES
def test_a_second_generation_is_like_the_first_one_of_a_new_model(examples: settings) -> None:
    examples(given(plans(tokens=TOKENS_THAT_SKIP))(assert_generations_are_independent))()


@pytest.mark.parametrize("product", ["sdpa", "operator"])
def test_generations_of_plans_skip(product: str) -> None:
    """Otherwise there would be nothing to tell them apart."""
    assert density_of_second_generation(Plan(product=product, tokens=TOKENS_THAT_SKIP)) < 0.9


@pytest.mark.parametrize(
    ("plan", "broken"),
    [
        (Plan(mask="keys"), "decide_attention.match_key_mask"),
        (Plan(product="operator", written="q_meanwhile"), "match_softmax_attention.written_meanwhile"),
    ],
    ids=["mask_ignored", "write_ignored"],
)
def test_a_broken_pass_is_noticed(plan: Plan, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_computes_the_same(plan)
    monkeypatch.setattr(f"lite_compile.passes.{broken}", lambda *args: None)
    monkeypatch.setitem(globals(), "was_rewritten", lambda plan: True)  # it would notice first
    with pytest.raises(AssertionError):
        assert_computes_the_same(plan)
