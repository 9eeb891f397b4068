"""Masks persist across compiled calls: one compilation, no graph break, no recompilation, density that only falls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import (
    DEVICE,
    OPTIONS,
    TOLERANCE,
    compiled,
    denoise,
    noise,
    prompt,
    run_pipeline,
    tiny_pipeline,
    tiny_wan,
)
from torch._dynamo.utils import counters

import lite_compile
from lite_compile.clock import RESET
from lite_compile.layer_state import layer_states
from lite_compile.layer_stats import skip_mask


@pytest.fixture(autouse=True)
def _clean_counters() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_fifty_steps_of_a_pipeline_with_sequential_guidance() -> None:
    model = tiny_wan()
    history: list[dict[tuple[str, int], float]] = []

    def watch(pipeline: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        history.append({(s.layer, s.stream): s.density for s in lite_compile.stats(model).streams})
        return kwargs

    run_pipeline(tiny_pipeline(compiled(model)), seed=0, steps=50, callback_on_step_end=watch)

    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    layers = ["blocks.0.attn1", "blocks.1.attn1"]
    assert set(history[-1]) == {(layer, stream) for layer in layers for stream in (0, 1)}
    for before, after in itertools.pairwise(history):
        assert all(after[key] <= before[key] for key in before)
    assert all(density == 1.0 for density in history[0].values())
    assert max(history[-1].values()) < 1
    assert lite_compile.stats(model).density < 0.95
    stats = lite_compile.stats(model)
    assert {(s.steps, s.generations) for s in stats.streams} == {(50, 1)}
    deep = [state for state in layer_states(model) if state.layer == "blocks.1.attn1"]
    assert not torch.equal(skip_mask(deep[0], 0), skip_mask(deep[0], 1))


def test_a_reset_starts_over_and_a_generation_resets_on_both_sides() -> None:
    model = tiny_wan()
    run, arguments = compiled(model), (noise(0), [prompt(0)], 10)
    first = denoise(run, *arguments, stop_after=5)

    def generations() -> int:
        return lite_compile.stats(model).streams[0].generations

    assert generations() == 1
    continued = {
        "hidden_states": first,
        "timestep": torch.tensor([500.0], device=DEVICE),
        "encoder_hidden_states": prompt(0),
        "return_dict": False,
    }
    with torch.no_grad():
        run(**continued)
        assert generations() == 1
        lite_compile.reset(model)
        run(**continued)
        assert generations() == 2
        assert lite_compile.stats(model).density == 1.0
        with lite_compile.generation(model):
            run(**continued)
            assert generations() == 3
        run(**continued)
        assert generations() == 4
        lite_compile.reset()
        run(**continued)
        assert generations() == 5


def test_reset_of_another_model_changes_nothing() -> None:
    model, other = tiny_wan(), tiny_wan(1)
    denoise(compiled(model), noise(0), [prompt(0)], 10, stop_after=3)
    lite_compile.reset(other)
    assert not any(int(state.clock[RESET]) for state in layer_states(model))


@pytest.mark.parametrize("wrong", ["transformer", 3, tiny_pipeline])
def test_reset_of_something_that_is_no_module(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"pipe\.transformer"):
        lite_compile.reset(wrong)


def test_dynamic_shapes_keep_one_state_per_shape() -> None:
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", dynamic=True, fullgraph=True, options=OPTIONS)
    for number, height in enumerate((32, 48, 40, 32)):
        latents = noise(number, (1, 4, 4, height, 32))
        plain = denoise(tiny_wan(), latents, [prompt(number)], 3, stop_after=1)
        result = denoise(run, latents, [prompt(number)], 3, stop_after=1)
        assert (result - plain).norm() < TOLERANCE * plain.norm()
        assert {s.density for s in lite_compile.stats(model).streams} == {1.0}
    shapes = {state.state.shape for state in layer_states(model)}
    assert len(shapes) == 3


class NoClock(torch.nn.Module):
    """Self-attention that is told neither latents nor timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tiny_wan(layers=1).blocks[0].attn1

    def forward(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self.block(tokens, None, None, (cos, sin))


def test_announced_generations_are_the_clock_where_there_is_none() -> None:
    model = NoClock()
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    tokens = noise(0, (2, 1, 1024, 64))
    run = compiled(model)

    def densities() -> list[float]:
        return [s.density for s in lite_compile.stats(model).streams]

    with torch.no_grad():
        with lite_compile.generation(model) as generation:
            run(tokens[0], cos, sin)  # not announced: dense, and nothing recorded
            assert densities() == []
            for _ in range(3):
                for stream in (0, 1):
                    generation.step(stream)
                    run(tokens[stream], cos, sin)
            assert len(densities()) == 2
            assert max(densities()) < 1.0
        expected = model(tokens[0], cos, sin)
        assert (run(tokens[0], cos, sin) - expected).norm() < TOLERANCE * expected.norm()
        with lite_compile.generation(model) as generation:
            generation.step()
            run(tokens[0], cos, sin)
            assert densities() == [1.0]
            lite_compile.reset(model)
            for seed in (3, 4):  # not announced, then announced: nothing of before is used
                other = noise(seed, (1, 1024, 64))
                dense = model(other, cos, sin)
                assert (run(other, cos, sin) - dense).norm() < TOLERANCE * dense.norm()
                if seed == 3:
                    generation.step()
            assert densities() == [1.0]
            with pytest.raises(ValueError, match="-1"):
                generation.step(-1)
    assert "announced" in lite_compile.report().graphs[-1].clock


def test_an_announcement_is_good_for_one_call() -> None:
    model = NoClock()
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    tokens = noise(0, (2, 1, 1024, 64))
    run = compiled(model)
    with torch.no_grad(), lite_compile.generation(model) as generation:
        for _ in range(3):
            generation.step()
            run(tokens[0], cos, sin)
            dense = model(tokens[1], cos, sin)  # another prompt, for which nobody announced a stream
            assert (run(tokens[1], cos, sin) - dense).norm() < TOLERANCE * dense.norm()
        (stream,) = lite_compile.stats(model).streams
        assert (stream.stream, stream.steps) == (0, 3)
        assert stream.density < 1


def test_without_a_generation_a_model_without_a_clock_stays_dense() -> None:
    run = compiled(NoClock())
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    with torch.no_grad():
        run(noise(0, (1, 1024, 64)), cos, sin)
    (site,) = lite_compile.report().graphs[-1].sites
    assert site.reason is lite_compile.Reason.NO_CLOCK
