"""Shares of the budget by what errors of layers do to the result."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile.calibration.budget import Budget, default_share
from lite_compile.calibration.influence import LEAST, shares_of, split

STEPS = 5


def test_the_layer_whose_errors_weigh_more_gets_the_smaller_share() -> None:
    """The second layer's attention hardly reaches the result: its output is scaled down."""
    torch._dynamo.reset()
    model = tiny_wan()
    with torch.no_grad():
        model.blocks[1].attn1.to_out[0].weight.mul_(0.05)
        model.blocks[1].attn1.to_out[0].bias.zero_()
    call = compiled(model)

    def run(number: int) -> Tensor:
        return denoise(call, noise(number), [prompt(number), prompt(99)], STEPS)

    found = lite_compile.calibrate(model, run, 0.02, prompts=[0, 1], target_psnr=60)
    shares = found.budget.layers
    assert shares["blocks.1.attn1"] == 1
    assert LEAST <= shares["blocks.0.attn1"] < 0.5
    budget = found.budget
    assert budget.at(0.5, "blocks.0.attn1") == pytest.approx(budget.at(0.5) * shares["blocks.0.attn1"])
    assert found.quality is not None
    assert min(found.quality.calibration) >= 60


def test_an_output_that_cannot_be_compared_matters_for_targets_of_quality_alone() -> None:
    torch._dynamo.reset()
    model = tiny_wan(layers=1)
    call = compiled(model)

    def run(number: int) -> None:
        denoise(call, noise(number), [prompt(number)], STEPS)

    assert lite_compile.calibrate(model, run, 0.02, prompts=[0]).met == 1
    with pytest.raises(TypeError, match="let it return what the pipeline returned"):
        lite_compile.calibrate(model, run, prompts=[0], target_psnr=40)


def test_shares_go_with_one_over_influence() -> None:
    groups = {("a",): 1.0, ("b", "c"): 2.0, ("d",): 4.0, ("e",): 1000.0, ("f",): 0.5}
    shares = shares_of(groups)
    assert shares == {"a": 1.0, "b": 0.5, "c": 0.5, "d": 0.25, "e": LEAST, "f": 1.0}
    assert shares_of({}) == {}


@pytest.mark.parametrize(
    ("layers", "sizes"), [(0, []), (1, [1]), (3, [1, 1, 1]), (8, [1] * 8), (30, [3, 4, 4, 4, 3, 4, 4, 4])]
)
def test_groups_are_consecutive_and_alike(layers: int, sizes: list[int]) -> None:
    names = [str(i) for i in range(layers)]
    groups = split(names, 8)
    assert [len(group) for group in groups] == sizes
    assert [name for group in groups for name in group] == names


def test_positions_are_those_of_the_steps() -> None:
    budget = Budget(0.1, "l1", steps=(0.0, 0.01, 0.1, 0.6))
    assert [budget.share_at(f) for f in (0.0, 0.01, 0.1, 0.6, 1.0)] == [default_share(i / 3) for i in (0, 1, 2, 3, 3)]
    assert budget.share_at(0.055) == pytest.approx(default_share(0.5))
    assert Budget(0.1, "l1").share_at(0.3) == default_share(0.3)
    assert math.isclose(Budget(0.1, "l1", steps=(0.0,)).share_at(0.3), default_share(0.3))
