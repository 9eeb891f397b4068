"""The option `refresh_every`: every so many steps a step that computes everything and marks anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import DEVICE, compiled, denoise, noise, prompt, tiny_wan
from test_clock import TIMES, N, P, trajectory
from test_persistence import NoClock
from test_regional import compile_blocks, compile_whole
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lite_compile
from lite_compile.clock import advance, clock_words, slot_table
from lite_compile.layer_state import layer_states
from lite_compile.ops import NOW_EPOCH, NOW_GENERATION, NOW_SLOT, NOW_STEP

PROMPTS = [prompt(0), prompt(1)]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


class Clock:
    """A clock of four streams and the calls made so far."""

    def __init__(self, refresh_every: int, dense_steps: tuple[int, int] = (0, 0)) -> None:
        self.state = torch.zeros(clock_words(4, 1), dtype=torch.int32)
        self.rules = (4, dense_steps, refresh_every)

    def call(self, latents: Tensor, t: float, prompt: Tensor = P) -> list[int]:
        """`[step, slot, epoch]`"""
        now = advance(self.state, latents, torch.tensor([t]), [prompt], *self.rules)
        assert int(now[NOW_GENERATION]) == 1
        return [int(now[word]) for word in (NOW_STEP, NOW_SLOT, NOW_EPOCH)]


def test_each_stream_gets_another_epoch_once_per_refresh() -> None:
    clock = Clock(2)
    found = [clock.call(x, t, p) for x, t in zip(trajectory(0, TIMES), TIMES, strict=True) for p in (P, N)]
    epochs = [(1, 2), (1, 2), (3, 4), (3, 4), (5, 6)]
    assert found == [[step, slot, epochs[step][slot]] for step in range(5) for slot in (0, 1)]
    assert slot_table(clock.state, 4)[4, :2].tolist() == [1, 2]  # what they began with


def test_a_stream_that_pauses_is_refreshed_when_it_returns() -> None:
    clock, xs = Clock(2), trajectory(0, TIMES)
    for x, t in zip(xs[:2], TIMES, strict=False):
        clock.call(x, t, P), clock.call(x, t, N)
    clock.call(xs[2], TIMES[2], P)  # without N
    assert clock.call(xs[3], TIMES[3], P) == [3, 0, 3]
    assert clock.call(xs[3], TIMES[3], N) == [3, 1, 4]
    assert clock.call(xs[4], TIMES[4], N) == [4, 1, 5]


def test_second_evaluations_refresh_nothing() -> None:
    clock, (x, y, z, *_) = Clock(2), trajectory(0, TIMES)
    clock.call(x, 1000.0), clock.call(y, 800.0)
    assert clock.call(z, 600.0) == [2, 0, 2]
    assert clock.call(z + 0.001 * x, 600.0) == [2, -1, 0]
    assert int(slot_table(clock.state, 4)[2, 0]) == 2


def test_a_refresh_at_a_dense_step_is_made_at_the_next() -> None:
    """A dense step marks nothing, so the step after it has an empty mask and marks anew."""
    clock = Clock(2, (3, 0))
    found = [clock.call(x, t) for x, t in zip(trajectory(0, TIMES), TIMES, strict=True)]
    assert found == [[0, -1, 1], [1, -1, 1], [2, -1, 2], [3, 0, 2], [4, 0, 3]]


def histories(model: nn.Module) -> list[list[bool]]:
    """Whether each step of each stream computed everything, for all layers alike."""
    found: dict[int, list[bool]] = {}
    for s in lite_compile.stats(model).streams:
        full = [density == 1 for density in s.history]
        assert found.setdefault(s.stream, full) == full
        assert s.steps == len(s.history)
    return list(found.values())


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_steps_of_a_model(compile_model: Any, inner: str) -> None:
    model = tiny_wan()
    run = compile_model(model, threshold=-1.0, refresh_every=3, history=True, inner=inner)
    for seed in (0, 1):
        denoise(run, noise(seed), PROMPTS, 7)
        assert histories(model) == [[True, False, False, True, False, False, True]] * 2
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    assert {s.generations for s in lite_compile.stats(model).streams} == {2}


def calls(steps: Sequence[int], latents: Tensor) -> list[dict[str, Any]]:
    rest = {"encoder_hidden_states": PROMPTS[0], "return_dict": False}
    return [
        {"hidden_states": latents * (1 - 0.05 * s), "timestep": torch.tensor([1000.0 - 100 * s], device=DEVICE), **rest}
        for s in steps
    ]


def test_a_refreshed_step_is_like_the_first_one_of_a_model() -> None:
    """It computes what a model without any mask computes, and leaves the marks that such a model leaves."""
    model, fresh = tiny_wan(), tiny_wan()
    run = compiled(model, threshold=-3.0, refresh_every=2)
    with torch.no_grad():
        before, _, refreshed = (run(**call)[0] for call in calls(range(3), noise(0)))
        expected = compiled(fresh, threshold=-3.0)(**calls([2], noise(0))[0])[0]
    assert not torch.equal(before, refreshed)
    # Anchors of the mask before only steer the order of visits, which a void mask does not have.
    assert torch.equal(refreshed, expected)
    for ours, theirs in zip(layer_states(model), layer_states(fresh), strict=True):
        assert torch.equal(ours.state[0, ..., 1:], theirs.state[0, ..., 1:])
    assert any(bool((state.state[0, ..., 2:] != 0).any()) for state in layer_states(model))


def test_every_step_refreshed_is_dense() -> None:
    model = tiny_wan()
    denoise(compiled(model, threshold=0.0, refresh_every=1, history=True), noise(0), PROMPTS, 4)
    assert histories(model) == [[True] * 4] * 2


def test_dense_steps_and_a_threshold_that_is_set() -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-1.0, refresh_every=3, dense_steps=(2, 0), history=True)
    denoise(run, noise(0), PROMPTS, 6)
    for s in lite_compile.stats(model).streams:
        assert [None if d is None else d == 1 for d in s.history] == [None, None, True, True, False, False]
    lite_compile.set_threshold(model, -float("inf"))
    denoise(run, noise(1), PROMPTS, 6)
    assert lite_compile.stats(model).density == 1


def test_announced_steps() -> None:
    model = NoClock()
    cos, sin = tiny_wan(layers=1).rope(noise(0))
    tokens = noise(0, (1, 1024, 64))
    run = compiled(model, threshold=0.0, refresh_every=2, history=True)
    with torch.no_grad():
        for _ in range(2):
            with lite_compile.generation(model) as generation:
                for _ in range(5):
                    for stream in (0, 1):
                        generation.step(stream)
                        run(tokens, cos, sin)
                assert histories(model) == [[True, False, True, False, True]] * 2


def test_models_compiled_with_another_number_keep_their_own() -> None:
    """Blocks share one graph text, which does not show it."""
    found = []
    model = tiny_wan()
    for every in (None, 2):
        torch._dynamo.reset()
        run = compile_blocks(model, threshold=-1.0, refresh_every=every, history=True)
        denoise(run, noise(0), PROMPTS[:1], 4)
        found.append(histories(model))
    assert found == [[[True, False, False, False]], [[True, False, True, False]]]
