"""Schedules and `set_threshold` through compiled models: per model and layer, without recompiling, voiding masks."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import scenarios
import torch
from fresh import in_fresh_process
from models import DEVICE, OPTIONS, compiled, denoise, noise, prompt, tiny_wan
from test_persistence import NoClock
from test_regional import compile_blocks, compile_whole
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lite_compile
from lite_compile import OptionTypeError, OptionValueError, Schedule
from lite_compile.layer_state import bindings, layer_states
from lite_compile.options import Options
from lite_compile.schedule import Thresholds

PROMPTS = [prompt(0), prompt(1)]
NEVER = -math.inf


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def densities(model: nn.Module) -> dict[str, float]:
    """By layer, the mean over streams."""
    found: dict[str, list[float]] = {}
    for s in lite_compile.stats(model).streams:
        found.setdefault(s.layer, []).append(s.density)
    return {layer: sum(values) / len(values) for layer, values in found.items()}


def masks(model: nn.Module) -> list[Tensor]:
    return [state.state.clone() for state in layer_states(model)]


def fresh_run(threshold: Any, seed: int = 0, steps: int = 5) -> tuple[Tensor, list[Tensor]]:
    """A generation of a model that was compiled with that threshold, and its states."""
    model = tiny_wan()
    return denoise(compiled(model, threshold=threshold), noise(seed), PROMPTS, steps), masks(model)


def assert_same(ours: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(a[..., 1:], b[..., 1:]) for a, b in zip(ours[1], expected[1], strict=True))  # all but epochs


def test_a_schedule_that_does_not_change_is_the_number() -> None:
    expected = fresh_run(-6.0)
    for value in (Schedule.constant(-6), [-6.0, -6.0], {"*": -6.0}, {"blocks.0.*": -6.0, "*": [-6.0, -6.0, -6.0]}):
        assert_same(fresh_run(value), expected)


def test_the_threshold_of_each_step_is_that_of_its_noise_level() -> None:
    """Step by step, the masks are those of a model that is told the number by hand."""
    schedule = Schedule.points({0: NEVER, 0.3: NEVER, 0.31: -12.0, 1: 0.0})
    scheduled, plain = tiny_wan(), tiny_wan()
    run, reference = compiled(scheduled, threshold=schedule), compiled(plain, threshold=NEVER)
    latents, grown = noise(0), []
    with torch.no_grad():
        for step in range(5):
            call = {"timestep": torch.tensor([1000.0 * (1 - step / 5)], device=DEVICE), "return_dict": False}
            call |= {"hidden_states": latents, "encoder_hidden_states": PROMPTS[0]}
            velocity = run(**call)[0]
            binding = bindings(plain)[0] if step else None
            if binding is not None:
                assert binding.thresholds.table is not None
                binding.thresholds.table.fill_(schedule.at(step / 5))
            assert (velocity - reference(**call)[0]).norm() <= 1e-4 * velocity.norm()
            grown.append(lite_compile.stats(scheduled).density)
            latents = latents - 0.2 * velocity
    assert grown[:3] == [1.0, 1.0, 1.0]  # the first marks are made at step 2
    assert grown[4] < grown[3] < 1


def test_each_layer_has_its_own() -> None:
    model = tiny_wan(layers=3)
    run = compiled(model, threshold={"blocks.1.*": NEVER, "blocks.2.attn1": Schedule.linear(NEVER, -1.0), "*": -6.0})
    denoise(run, noise(0), PROMPTS, 5)
    found = densities(model)
    assert found["blocks.0.attn1"] < 1
    assert found["blocks.1.attn1"] == found["blocks.2.attn1"] == 1


def test_blocks_that_share_a_graph_are_told_apart_by_their_full_names() -> None:
    model = compile_blocks(tiny_wan(layers=3), threshold={"blocks.1.*": NEVER, "*": -1.0})
    denoise(model, noise(0), PROMPTS, 5)
    found = densities(model)
    assert found["blocks.1.attn1"] == 1
    assert max(found["blocks.0.attn1"], found["blocks.2.attn1"]) < 1
    assert counters["stats"]["unique_graphs"] == 1


def test_the_table_is_no_part_of_the_graph() -> None:
    """Schedules are values of a graph input: the texts of the graphs are equal."""
    from graphs import Denoiser, capture, inputs

    from lite_compile.backend import rewrite_graph

    texts = set()
    for threshold in (-10.0, Schedule.cosine(-16, -4), {"*": [-3, -2, -1]}):
        gm, state, _ = rewrite_graph(capture(Denoiser(), *inputs()), Options(min_seq_len=64, threshold=threshold))
        assert state is not None
        texts.add(gm.code)
    assert len(texts) == 1


SCHEDULE = Schedule.cosine(-12, -1)


def scheduled_generation(number: int) -> Tensor:
    if number not in scenarios.MODELS:
        model = tiny_wan()
        scenarios.MODELS[number] = (model, compiled(model, threshold=SCHEDULE, dense_steps=(1, 0.2)))
    return denoise(scenarios.MODELS[number][1], noise(number), [prompt(number), prompt(number + 9)], 6)  # type: ignore[arg-type]


def test_a_second_generation_equals_the_same_one_in_a_fresh_process() -> None:
    scenarios.MODELS.clear()
    scheduled_generation(1)
    scenarios.MODELS[2] = scenarios.MODELS[1]
    second = scheduled_generation(2)
    assert lite_compile.stats(scenarios.MODELS[2][0]).streams  # type: ignore[arg-type]
    assert torch.equal(second, in_fresh_process(scheduled_generation, 2))


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_another_threshold_recompiles_nothing_and_equals_a_fresh_compilation(compile_model: Any, inner: str) -> None:
    model = tiny_wan()
    run = compile_model(model, threshold=NEVER, inner=inner)
    denoise(run, noise(0), PROMPTS, 5)
    assert lite_compile.stats(model).density == 1
    graphs = counters["stats"]["unique_graphs"]
    for value in (-1.0, Schedule.linear(-8, -1), {"blocks.0.*": -1.0, "*": NEVER}, [-3.0, -2.0, -1.0]):
        lite_compile.set_threshold(model, value)
        result = denoise(run, noise(1), PROMPTS, 5), masks(model)
        assert lite_compile.stats(model).density < 1
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["recompiles"]
        other = tiny_wan()
        assert_same(
            (denoise(compile_model(other, threshold=value, inner=inner), noise(1), PROMPTS, 5), masks(other)), result
        )
        graphs = counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_in_the_middle_of_a_generation_a_new_one_starts(compile_model: Any) -> None:
    """A mask of a bold threshold is not used under a careful one, and the next call is like the first of a model."""
    model, fresh = tiny_wan(), tiny_wan()
    run = compile_model(model, threshold=-1.0)
    latents = denoise(run, noise(0), PROMPTS, 6, stop_after=4)
    assert lite_compile.stats(model).density < 1
    lite_compile.set_threshold(model, -20.0)
    call = {"timestep": torch.tensor([300.0], device=DEVICE), "encoder_hidden_states": PROMPTS[0], "return_dict": False}
    call["hidden_states"] = latents
    with torch.no_grad():
        ours = run(**call)[0]
        expected = compile_model(fresh, threshold=-20.0)(**call)[0]
    assert torch.equal(ours, expected)
    assert {s.generations for s in lite_compile.stats(model).streams} == {2}
    assert {s.steps for s in lite_compile.stats(model).streams} == {1}


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_models_that_share_a_graph_keep_their_own(compile_model: Any) -> None:
    one, other = tiny_wan(0), tiny_wan(1)
    runs = {model: compile_model(model, threshold=-1.0) for model in (one, other)}
    for model, run in runs.items():
        denoise(run, noise(0), PROMPTS, 5, stop_after=3)
        assert lite_compile.stats(model).density < 1
    graphs, before = counters["stats"]["unique_graphs"], lite_compile.stats(other).streams
    assert graphs == 1
    lite_compile.set_threshold(one, NEVER)
    denoise(runs[one], noise(1), PROMPTS, 5)
    assert lite_compile.stats(one).density == 1
    assert lite_compile.stats(other).streams == before
    denoise(runs[other], noise(1), PROMPTS, 5)
    assert lite_compile.stats(other).density < 1
    assert counters["stats"]["unique_graphs"] == graphs


def test_models_that_share_a_block_keep_their_own() -> None:
    first, second = tiny_wan(0), tiny_wan(1)
    second.blocks[0] = first.blocks[0]
    runs = [compiled(model, threshold=-1.0) for model in (first, second)]
    lite_compile.set_threshold(first, NEVER)
    results = [denoise(run, noise(0), PROMPTS, 5) for run in runs]
    for result, seed, threshold in zip(results, (0, 1), (NEVER, -1.0), strict=True):
        alone = tiny_wan(seed)
        alone.blocks[0] = tiny_wan(0).blocks[0]
        assert torch.equal(result, denoise(compiled(alone, threshold=threshold), noise(0), PROMPTS, 5))
        assert (lite_compile.stats(alone).density == 1) == (threshold == NEVER)


def test_it_holds_for_graphs_that_are_compiled_later_and_for_new_contents() -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-1.0)
    lite_compile.set_threshold(run, NEVER)  # what torch.compile returned stands for the model
    denoise(run, noise(0), PROMPTS, 4)
    assert lite_compile.stats(model).density == 1
    denoise(run, noise(0, (1, 4, 4, 32, 48)), PROMPTS, 4)
    assert lite_compile.stats(model).density == 1
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight.mul_(1.01)
    denoise(run, noise(0), PROMPTS, 4)
    assert lite_compile.stats(model).density == 1
    lite_compile.set_threshold(model, -1.0)
    denoise(run, noise(0), PROMPTS, 4)
    assert lite_compile.stats(model).density < 1


def test_the_same_again_starts_no_generation() -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-6.0)
    expected = denoise(run, noise(0), PROMPTS, 6)
    lite_compile.set_threshold(model, Schedule.constant(-6.0))
    lite_compile.set_threshold(tiny_wan(1), -3.0)  # another model
    latents = denoise(run, noise(0), PROMPTS, 6)
    assert torch.equal(latents, expected)
    assert {s.generations for s in lite_compile.stats(model).streams} == {2}


def test_announced_generations_go_on_without_their_masks() -> None:
    model = NoClock()
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    tokens = noise(0, (1, 1024, 64))
    run = compiled(model, threshold=-1.0)
    with torch.no_grad(), lite_compile.generation(model) as generation:
        found = []
        for step in range(4):
            if step == 2:
                lite_compile.set_threshold(model, NEVER)
            generation.step()
            run(tokens, cos, sin)
            found.append(lite_compile.stats(model).density)
    assert found[0] == 1 > found[1]
    assert found[2:] == [1, 1]


def test_announced_steps_are_where_schedules_stand_without_a_clock() -> None:
    model = NoClock()
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    tokens = noise(0, (1, 1024, 64))
    run = compiled(model, threshold=Schedule.points({0: NEVER, 0.49: NEVER, 0.5: -1.0, 1: -1.0}))
    with torch.no_grad():
        for steps, expected in ((4, [1, 1, 1, 0]), (None, [1, 1, 1, 1])):
            found = []
            with lite_compile.generation(model, steps=steps) as generation:
                for _ in range(4):
                    generation.step()
                    run(tokens, cos, sin)
                    found.append(lite_compile.stats(model).density)
            assert [density == 1 for density in found] == list(map(bool, expected))


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_dense_steps_compute_everything_and_keep_the_masks(compile_model: Any) -> None:
    model, dense = tiny_wan(), tiny_wan()
    run = compile_model(model, threshold=-1.0, dense_steps=(2, 1))
    histories = []
    for generation in range(3):
        latents, history = noise(generation), []
        known = {"steps": 7} if generation == 2 else {}
        with torch.no_grad(), lite_compile.generation(model, **known):
            for step in range(7):
                call = {"timestep": torch.tensor([1000.0 * (1 - step / 7)], device=DEVICE), "return_dict": False}
                call |= {"hidden_states": latents, "encoder_hidden_states": PROMPTS[0]}
                before, velocity, exact = masks(model), run(**call)[0], dense(**call)[0]
                density = lite_compile.stats(model).density
                if density == 1 and step != 2:  # step 2 is the first that records
                    assert (velocity - exact).norm() < 1e-4 * exact.norm()
                    assert not before or all(map(torch.equal, before, masks(model)))
                history.append(density)
                latents = latents - velocity / 7
        histories.append([density == 1 for density in history])
    learned = [True, True, True, False, False, False, True]
    assert histories == [[*learned[:-1], False], learned, learned]
    (stream, *_) = lite_compile.stats(model).streams
    assert stream.dense_calls == 2 + 3 + 3


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, "5"])
def test_a_wrong_number_of_steps(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"steps is .*allowed"), lite_compile.generation(steps=wrong):
        pass


@pytest.mark.parametrize(
    ("value", "kind", "named"),
    [
        (1.0, OptionValueError, "1.0"),
        ({"blocks.*": -3.0}, OptionValueError, r"'\*'"),
        ([-3.0, "x"], OptionTypeError, r"threshold\[1\].*'x'"),
        (None, OptionTypeError, "None"),
    ],
)
def test_a_wrong_threshold_changes_nothing(value: Any, kind: type[Exception], named: str) -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-1.0)
    denoise(run, noise(0), PROMPTS, 6, stop_after=3)
    before, streams = masks(model), lite_compile.stats(model).streams
    with pytest.raises(kind, match=named):
        lite_compile.set_threshold(model, value)
    assert lite_compile.stats(model).streams == streams
    assert all(torch.equal(a, b) for a, b in zip(before, masks(model), strict=True))
    expected = denoise(compiled(tiny_wan(), threshold=-1.0), noise(1), PROMPTS, 4)
    assert torch.equal(denoise(run, noise(1), PROMPTS, 4), expected)


class Calibrated(Thresholds):
    """Knows two layers, as a calibration does."""

    def schedule(self, layer: str) -> Schedule:
        known = {"blocks.0.attn1": Schedule.linear(-6, -1), "blocks.1.attn1": Schedule.constant(NEVER)}
        if layer not in known:
            raise OptionValueError(f"the calibration lacks layer {layer!r}; it has {', '.join(known)}")
        return known[layer]


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_thresholds_that_do_not_fit_the_layers_raise_at_first_use_or_when_they_are_set(compile_model: Any) -> None:
    model, larger = tiny_wan(), tiny_wan(layers=3)
    denoise(compile_model(model, threshold=Calibrated()), noise(0), PROMPTS, 5)
    assert densities(model)["blocks.0.attn1"] < 1 == densities(model)["blocks.1.attn1"]
    with pytest.raises(OptionValueError, match=r"lacks layer 'blocks.2.attn1'"):
        denoise(compile_model(larger, threshold=Calibrated()), noise(0), PROMPTS, 5)
    torch._dynamo.reset()
    larger = tiny_wan(layers=3)
    run = compile_model(larger, threshold=-1.0)
    latents = denoise(run, noise(0), PROMPTS, 5)
    with pytest.raises(OptionValueError, match=r"lacks layer 'blocks.2.attn1'"):
        lite_compile.set_threshold(larger, Calibrated())
    assert torch.equal(denoise(run, noise(0), PROMPTS, 5), latents)


@pytest.mark.parametrize("wrong", ["transformer", None, 3])
def test_a_model_that_is_none(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        lite_compile.set_threshold(wrong, -3.0)


def test_the_options_of_the_tests_skip() -> None:
    """Without this, `density < 1` above would say nothing about thresholds."""
    assert OPTIONS["threshold"] == -6.0


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_masks_of_an_override_do_not_outlive_it(compile_model: Any) -> None:
    """The threshold of a model around this one is gone with that model, as soon as anything else is set."""
    model, around = tiny_wan(), nn.Module()
    around.inner = model
    run = compile_model(model, threshold=NEVER)
    lite_compile.set_threshold(around, -1.0)
    latents = denoise(run, noise(0), PROMPTS, 6, stop_after=4)
    assert lite_compile.stats(model).density < 1
    del around
    gc.collect()
    lite_compile.set_threshold(nn.Linear(1, 1), -3.0)
    timestep = torch.tensor([1000.0 * (1 - 4 / 6)], device=DEVICE)
    with torch.no_grad():
        run(hidden_states=latents, timestep=timestep, encoder_hidden_states=PROMPTS[0], return_dict=False)
    assert {s.density for s in lite_compile.stats(model).streams if s.stream == 0} == {1.0}


def test_thresholds_set_under_another_default_device() -> None:
    model = tiny_wan()
    run = compiled(model, threshold=NEVER)
    denoise(run, noise(0), PROMPTS, 2)
    with torch.device("meta"):
        lite_compile.set_threshold(model, -1.015625)
    denoise(run, noise(0), PROMPTS, 5)
    assert lite_compile.stats(model).density < 1


def test_one_dense_step_is_not_the_whole_trajectory() -> None:
    model = compile_blocks(tiny_wan(), threshold=-1.0, dense_steps=(1.0, 0))
    denoise(model, noise(0), PROMPTS, 5)
    assert lite_compile.stats(model).density == 1
    torch._dynamo.reset()
    denoise(compile_blocks(model, threshold=-1.0, dense_steps=(1, 0)), noise(0), PROMPTS, 5)
    assert lite_compile.stats(model).density < 1


def test_steps_announced_under_another_default_device() -> None:
    model = NoClock()
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    run = compiled(model, threshold=-1.0)
    with torch.no_grad(), lite_compile.generation(model) as generation:
        for _ in range(3):
            with torch.device("meta"):
                generation.step()
            run(noise(0, (1, 1024, 64)), cos, sin)
    assert lite_compile.stats(model).density < 1


def test_the_number_of_steps_is_known_again_after_a_generation_within_another() -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-1.0, dense_steps=(0, 1), history=True)
    with lite_compile.generation(model, steps=5):
        denoise(run, noise(0), PROMPTS, 5)
        with lite_compile.generation(model, steps=3):
            denoise(run, noise(1), PROMPTS, 3)
            assert [density is None for density in lite_compile.stats(model).mean_history(0)] == [False, False, True]
        denoise(run, noise(0), PROMPTS, 5)
        assert [density is None for density in lite_compile.stats(model).mean_history(0)] == [False] * 4 + [True]
