"""The option `dense_layers`: layers that skip nothing, whichever way the model is compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import DEVICE, OPTIONS, TOLERANCE, compiled, denoise, noise, prompt, tiny_wan
from test_regional import compile_blocks, compile_whole, distance
from test_thresholds import densities
from torch._dynamo.utils import counters

import lite_compile
from lite_compile import Reason
from lite_compile.dense_layers import DenseLayers, ExactLayers, choose_layers
from lite_compile.layer_state import bindings
from lite_compile.passes import decide_dense_layers
from lite_compile.schedule import Schedule

PROMPTS = [prompt(0), prompt(1)]
LAYERS = tuple(f"blocks.{number}.attn1" for number in range(4))


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()
    lite_compile.clear_report()


def test_which_layers_are_chosen() -> None:
    for rule, expected in (
        (DenseLayers(), []),
        (DenseLayers(first=1), [0]),
        (DenseLayers(last=2), [2, 3]),
        (DenseLayers(first=1, last=1), [0, 3]),
        (DenseLayers(first=9), [0, 1, 2, 3]),
        (DenseLayers(("*.1.*", "blocks.3.attn1", "nothing")), [1, 3]),
    ):
        assert choose_layers(rule, LAYERS) == {LAYERS[n] for n in expected}, rule
    assert choose_layers(DenseLayers(first=1), ("a", "a", "b")) == {"a"}  # one layer that is called twice


def test_exact_layers_mark_nothing_and_others_follow_what_was_given() -> None:
    thresholds = ExactLayers(Schedule.linear(-8, -2), frozenset(LAYERS[:1]))
    assert thresholds.schedule(LAYERS[0]).at(0.5) == -math.inf
    assert thresholds.schedule(LAYERS[1]).at(0.5) == -5


RULES: list[tuple[Any, list[int]]] = [
    ((1, 1), [0, 3]),
    ((0, 1), [3]),
    ((2, 0), [0, 1]),
    (["blocks.2.*", "*.0.attn1"], [0, 2]),
]


@pytest.mark.parametrize(("rule", "dense"), RULES, ids=str)
def test_blocks_compiled_one_by_one(rule: Any, dense: list[int]) -> None:
    """One graph serves all of them, and the last block is known to be the last once all have run."""
    model = compile_blocks(tiny_wan(layers=4), threshold=-1.0, dense_layers=rule)
    for seed in (0, 1):
        denoise(model, noise(seed), PROMPTS, 5)
        found = densities(model)
        assert [found[layer] == 1 for layer in LAYERS] == [number in dense for number in range(4)]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(("rule", "dense"), RULES[:1] + RULES[3:], ids=str)
def test_a_whole_model_whose_kernel_gains_nothing_keeps_dense_attention(
    rule: Any, dense: list[int], inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide_dense_layers, "FAST_WHEN_DENSE", frozenset())
    model = tiny_wan(layers=4)
    denoise(compiled(model, threshold=-1.0, dense_layers=rule, inner=inner), noise(0), PROMPTS, 5)
    sites = {site.layer: site for site in lite_compile.report() if "attn1" in site.layer}
    for number, layer in enumerate(LAYERS):
        assert sites[layer].rewritten == (number not in dense)
        if number in dense:
            assert sites[layer].reason is Reason.EXCLUDED
            assert "dense_layers" in sites[layer].detail
    found = densities(model)
    assert found.keys() == {LAYERS[number] for number in range(4) if number not in dense}
    assert max(found.values()) < 1


@pytest.mark.parametrize(("rule", "dense"), RULES, ids=str)
def test_a_whole_model_whose_kernel_is_fast_uses_it(
    rule: Any, dense: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide_dense_layers, "FAST_WHEN_DENSE", frozenset({"cpu", "triton", "hopper"}))
    model = tiny_wan(layers=4)
    run = compiled(model, threshold=-1.0, dense_layers=rule)
    denoise(run, noise(0), PROMPTS, 5)
    for _ in range(2):
        found = densities(model)
        assert [found[layer] == 1 for layer in LAYERS] == [number in dense for number in range(4)]
        lite_compile.set_threshold(model, {"blocks.1.*": -0.5, "*": -2.0})  # dense layers stay dense
        denoise(run, noise(1), PROMPTS, 5)


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_a_model_all_of_whose_layers_are_dense_is_exact(compile_model: Any) -> None:
    model, plain = tiny_wan(), tiny_wan()
    expected = denoise(plain, noise(0), PROMPTS, 4)
    run = compile_model(model, threshold=0.0, dense_layers=["*"])
    assert distance(denoise(run, noise(0), PROMPTS, 4), expected) < TOLERANCE


def test_models_that_share_a_graph_text_keep_their_own() -> None:
    """Under regional compilation the text does not show which layers are dense."""
    model = tiny_wan(layers=2)
    for rule, dense in (((1, 0), 0), ((0, 1), 1)):
        torch._dynamo.reset()
        denoise(compile_blocks(model, threshold=-1.0, dense_layers=rule), noise(0), PROMPTS, 5)
        assert [densities(model)[LAYERS[number]] == 1 for number in range(2)] == [
            number == dense for number in range(2)
        ]


def test_excluded_layers_do_not_count() -> None:
    """Nor do those that ran before, under other options."""
    options: dict[str, Any] = {"threshold": -1.0, "dense_layers": (1, 1), "exclude_layers": ["blocks.0.*"]}
    model = compile_blocks(tiny_wan(layers=4), threshold=-1.0)
    denoise(model, noise(0), PROMPTS, 1)
    torch._dynamo.reset()
    denoise(compile_blocks(model, **options), noise(0), PROMPTS, 5)
    sparse = [layer for layer, density in densities(model).items() if density < 1]
    whole = tiny_wan(layers=4).to(DEVICE)
    denoise(compile_whole(whole, **options), noise(0), PROMPTS, 5)
    assert sparse == [LAYERS[2]] == [layer for layer, density in densities(whole).items() if density < 1]


def test_graphs_of_one_text_that_are_called_in_turns_follow_their_own_options() -> None:
    """They share the states, but not which layers are left to be counted."""
    model = tiny_wan(layers=3)
    blocks = list(model.blocks)
    first_of: dict[str, torch.nn.ModuleList] = {}
    for first, excluded in (("blocks.0.attn1", ["blocks.2.*"]), ("blocks.1.attn1", ["blocks.0.*"])):
        options = {**OPTIONS, "threshold": -1.0, "dense_layers": (1, 0), "exclude_layers": excluded}
        run = [torch.compile(block, backend="liteattention", fullgraph=True, options=options) for block in blocks]
        first_of[first] = torch.nn.ModuleList(run)
    for first in [*first_of, *first_of]:
        model.blocks = first_of[first]
        denoise(model, noise(0), PROMPTS, 2)
        found = bindings(model)
        assert len(found) == 3
        assert {binding.thresholds.exact for binding in found} == {frozenset([first])}


def test_blocks_that_two_roots_hold_in_another_order_follow_their_names_in_each() -> None:
    options = {"threshold": {"blocks.0.*": -1.0, "*": -float("inf")}}
    one, other = compile_blocks(tiny_wan(), **options), tiny_wan()
    other.blocks = torch.nn.ModuleList(reversed(one.blocks))
    for model in (one, other, one):
        denoise(model, noise(0), PROMPTS[:1], 4)
        sparse = [layer for layer, density in densities(model).items() if density < 1]
        assert sparse == ["blocks.0.attn1"]
