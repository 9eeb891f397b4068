"""Blocks compiled one by one, as diffusers' regional compilation does, against the whole model: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_models import ZOO
from zoo_runs import OPTIONS, compile_model, generate

import lite_compile
from lite_compile.layer_state import layer_states

MODELS = ["WanTransformer3DModel-Wan-2-1", "FluxTransformer2DModel-dev", "HunyuanVideoTransformer3DModel"]


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The skip states of the layers that have been used."""
    return {state.layer: state.state.clone() for state in layer_states(model) if state.state.any()}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_one_by_one_give_the_numbers_and_masks_of_the_whole_model(name: str) -> None:
    zoo = ZOO[name]
    whole, regional = zoo.make(), zoo.make()
    options: dict[str, Any] = {"threshold": -1.0}
    compiled = compile_model(whole, **options)
    expected = [generate(zoo, compiled, number) for number in (0, 1)]
    torch._dynamo.reset()
    lite_compile.clear_report()
    regional.compile_repeated_blocks(backend="liteattention", options={**OPTIONS, **options})
    results = [generate(zoo, regional, number) for number in (0, 1)]
    assert all(map(torch.equal, results, expected))
    ours, theirs = masks(regional), masks(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)
    assert lite_compile.stats(regional).density == lite_compile.stats(whole).density < 1
