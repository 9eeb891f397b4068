"""A mask of another generation, prompt, model or shape is never used: results equal those of a fresh process."""

from __future__ import annotations

from typing import Any

import pytest
import scenarios
import torch
from fresh import in_fresh_process
from scenarios import generate, generate_with

import lite_compile


@pytest.fixture(autouse=True)
def _new_models() -> None:
    scenarios.MODELS.clear()
    torch._dynamo.reset()


def call(kwargs: dict[str, Any]) -> torch.Tensor:
    return generate(**kwargs)


def assert_like_fresh(second: dict[str, Any], *before: dict[str, Any]) -> None:
    for kwargs in before:
        generate(**kwargs)
    assert torch.equal(generate(**second), in_fresh_process(call, second))


def density(weights: int = 0) -> float:
    return lite_compile.stats(scenarios.MODELS[weights][0]).density


def test_second_generation_with_another_prompt_and_seed() -> None:
    assert_like_fresh({"number": 2}, {"number": 1})
    assert density() < 0.95  # masks were really in use


def test_second_generation_differs_when_masks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with a clock that never sees a new generation, it does."""
    honest = generate(2)
    scenarios.MODELS.clear()
    torch._dynamo.reset()

    def never_new(clock: Any, latents: Any, timestep: Any, conditions: Any, max_streams: int) -> torch.Tensor:
        calls = clock[3:4].add_(1)
        zeros, ones = torch.zeros_like(calls), torch.ones_like(calls)
        return torch.cat([ones, calls, zeros, ones, zeros])

    monkeypatch.setattr("lite_compile.passes.insert_step_guard.advance", never_new)
    generate(1)
    assert not torch.equal(generate(2), honest)


def test_two_models_of_one_class_used_alternately() -> None:
    first, second = {"number": 1, "weights": 0}, {"number": 2, "weights": 1}
    fresh = [in_fresh_process(call, kwargs) for kwargs in (first, second)]
    for _ in range(2):
        assert torch.equal(generate(**first), fresh[0])
        assert torch.equal(generate(**second), fresh[1])


def test_two_models_interleaved_step_by_step() -> None:
    """Both models' steps alternate, as Wan2.2's experts or two users' threads might."""
    alone = []
    for weights in (0, 1):
        alone.append(generate(weights, weights=weights))
    scenarios.MODELS.clear()
    torch._dynamo.reset()
    generators = [_stepwise(weights) for weights in (0, 1)]
    for _ in range(5):
        results = [next(generator) for generator in generators]
    assert all(torch.equal(a, b) for a, b in zip(results, alone, strict=True))


def _stepwise(weights: int) -> Any:
    from models import noise, prompt, timesteps

    latents, prompts = noise(weights), [prompt(10 * weights), prompt(10 * weights + 1)]
    model: Any = scenarios.model(weights)
    sigmas = [1 - step / 5 for step in range(6)]
    for step, t in enumerate(timesteps(5)):
        with torch.no_grad():
            v = [
                model(hidden_states=latents, timestep=t, encoder_hidden_states=p, return_dict=False)[0] for p in prompts
            ]
        latents = latents + (sigmas[step + 1] - sigmas[step]) * (v[1] + 3.0 * (v[0] - v[1]))
        yield latents


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_after_an_aborted_generation(stop_after: int) -> None:
    assert_like_fresh({"number": 2}, {"number": 1, "stop_after": stop_after})


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_after_an_aborted_generation_with_the_same_noise(stop_after: int) -> None:
    assert_like_fresh({"number": 2, "noise_seed": 1}, {"number": 1, "stop_after": stop_after})


def test_same_noise_and_one_stream_after_an_abort() -> None:
    """Without guidance, the new prompt's first call has the very latents and timestep of the aborted one."""
    assert_like_fresh({"number": 2, "noise_seed": 1, "streams": 1}, {"number": 1, "stop_after": 1, "streams": 1})


def test_batch_size_and_resolution_change_between_generations() -> None:
    shapes = [(1, 4, 4, 32, 32), (2, 4, 4, 32, 32), (1, 4, 4, 32, 48), (1, 4, 4, 32, 32)]
    for number, shape in enumerate(shapes):
        kwargs = {"number": number, "shape": shape}
        assert torch.equal(generate(**kwargs), in_fresh_process(call, kwargs))


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_generations(steps: int) -> None:
    fresh = {number: in_fresh_process(call, {"number": number, "steps": steps}) for number in (1, 2, 3)}
    for number in (1, 2, 3, 2):
        assert torch.equal(generate(number, steps), fresh[number])


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_generations_from_the_same_noise(steps: int) -> None:
    kwargs = [{"number": number, "steps": steps, "noise_seed": 7} for number in (1, 2, 3)]
    fresh = [in_fresh_process(call, kw) for kw in kwargs]
    for kw, expected in zip(kwargs, fresh, strict=True):
        assert torch.equal(generate(**kw), expected)
    assert torch.equal(generate(**{**kwargs[0], "steps": 5}), in_fresh_process(call, {**kwargs[0], "steps": 5}))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"per_token": True},
        {"dtype": torch.int64},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "steps": 1000, "stop_after": 8},
    ],
    ids=["per_token", "integer", "bfloat16", "bfloat16_rounding_to_equal_values"],
)
def test_timestep_kinds(kwargs: dict[str, Any]) -> None:
    assert_like_fresh({"number": 2, **kwargs}, {"number": 1, **kwargs})
    assert density() < 0.98


@pytest.mark.parametrize("scheduler", ["heun", "unipc"])
def test_schedulers(scheduler: str) -> None:
    generate_with(scheduler, 1, 6)
    assert torch.equal(generate_with(scheduler, 2, 6), in_fresh_process(generate_with, scheduler, 2, 6))
    assert density() < 0.98
    assert {s.generations for s in lite_compile.stats(scenarios.MODELS[0][0]).streams} == {2}


def test_more_streams_than_slots_run_dense() -> None:
    assert_like_fresh({"number": 2, "streams": 6}, {"number": 1, "streams": 6})
