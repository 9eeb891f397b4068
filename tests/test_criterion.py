"""The option `criterion` through compiled models."""

from __future__ import annotations

import math

import pytest
import torch
from models import TOLERANCE, compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile.layer_state import layer_states

PROMPTS = [prompt(0), prompt(1)]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_mass_skips_and_stays_close_to_dense(inner: str) -> None:
    model = tiny_wan()
    run = compiled(model, criterion="mass", threshold=-4.0, inner=inner)
    result = denoise(run, noise(0), PROMPTS, 5)
    dense = denoise(tiny_wan(), noise(0), PROMPTS, 5)
    assert 0.2 < lite_compile.stats(model).density < 0.95
    assert not torch.equal(result, dense)
    assert (result - dense).norm() < 2**-4 * dense.norm()


def test_no_budget_skips_nothing() -> None:
    model = tiny_wan()
    result = denoise(compiled(model, criterion="mass", threshold=-math.inf), noise(0), PROMPTS, 5)
    dense = denoise(tiny_wan(), noise(0), PROMPTS, 5)
    assert lite_compile.stats(model).density == 1
    assert (result - dense).norm() < TOLERANCE * dense.norm()


def test_the_budget_follows_a_schedule_and_set_threshold() -> None:
    """Without compiling anything anew."""
    model = tiny_wan()
    run = compiled(
        model, criterion="mass", threshold={"blocks.0.*": -math.inf, "*": lite_compile.Schedule.linear(-9, -2)}
    )
    denoise(run, noise(0), PROMPTS, 5)
    found = {stream.layer: stream.density for stream in lite_compile.stats(model).streams}
    assert found["blocks.0.attn1"] == 1 > found["blocks.1.attn1"]
    compilations = len(lite_compile.report().graphs)
    lite_compile.set_threshold(model, -math.inf)
    denoise(run, noise(1), PROMPTS, 5)
    assert lite_compile.stats(model).density == 1
    assert len(lite_compile.report().graphs) == compilations


def test_one_model_under_both_criteria_keeps_masks_apart() -> None:
    model = tiny_wan()
    denoise(compiled(model, threshold=-6.0), noise(0), PROMPTS, 5)
    (first,) = [state.state for state in layer_states(model) if state.layer == "blocks.0.attn1"]
    before = first.clone()
    denoise(compiled(model, threshold=-6.0, criterion="mass"), noise(0), PROMPTS, 1)
    (second,) = [state.state for state in layer_states(model) if state.layer == "blocks.0.attn1"]
    assert lite_compile.stats(model).density == 1  # a mask of the other would have been used
    assert first is not second
    assert torch.equal(first, before)


def test_reports_show_it() -> None:
    model = tiny_wan()
    lite_compile.clear_report()
    denoise(compiled(model, criterion="mass", threshold=-4.0), noise(0), PROMPTS, 2)
    options = lite_compile.report().graphs[-1].options
    assert options is not None
    assert options.criterion == "mass"
