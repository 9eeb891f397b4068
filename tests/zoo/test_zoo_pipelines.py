"""Pipelines of diffusers: a second generation is the one that a new process would make."""

from __future__ import annotations

import pytest
import torch
from fresh import in_fresh_process
from zoo_models import ZOO
from zoo_pipelines import PIPELINES, STEPS, generate_alone

import lite_compile

IN_CI = {
    "WanPipeline-two-experts",
    "WanPipeline-per-token-timesteps",
    "CogVideoXPipeline",
    "StableDiffusion3Pipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def slow_or_not(name: str) -> object:
    return pytest.param(name, marks=[] if name in IN_CI else pytest.mark.slow)


@pytest.mark.parametrize("name", list(map(slow_or_not, PIPELINES)))
def test_a_second_generation_is_like_the_first_one_of_a_new_pipeline(name: str) -> None:
    parts = PIPELINES[name]
    pipeline, models = parts.build()
    parts.generate(pipeline, 1)
    second = parts.generate(pipeline, 2)
    for model in models:
        streams = lite_compile.stats(model).streams
        assert streams or not ZOO[parts.model].rewritten
        assert all(stream.steps == STEPS // len(models) for stream in streams)
    torch._dynamo.reset()
    assert torch.equal(second, generate_alone(name, 2))


@pytest.mark.parametrize("name", ["FluxPipeline", "Lumina2Pipeline"])
def test_a_second_generation_is_like_one_in_a_fresh_process(name: str) -> None:
    parts = PIPELINES[name]
    pipeline, models = parts.build()
    parts.generate(pipeline, 1)
    assert torch.equal(parts.generate(pipeline, 2), in_fresh_process(generate_alone, name, 2))
    assert lite_compile.stats(models[0]).density < 1
