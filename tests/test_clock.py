"""The rules of the step clock, one by one, on the function that runs inside the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lite_compile.clock import CONDITION_WORDS, EPOCH, advance, clock_words, identify, sample
from lite_compile.ops import NOW_GENERATION, NOW_SLOT, NOW_STEP

STREAMS = 4


class Clock:
    """A clock and the calls made so far."""

    def __init__(self, max_streams: int = STREAMS, conditions: int = 1) -> None:
        self.state = torch.zeros(clock_words(max_streams, conditions), dtype=torch.int32)
        self.max_streams = max_streams

    def call(self, latents: Tensor, t: float | Tensor, *conditions: Tensor) -> tuple[int, int, int]:
        """`(generation, step, slot)` of a call."""
        timestep = t if isinstance(t, Tensor) else torch.tensor([t])
        now = advance(self.state, latents, timestep, conditions, self.max_streams)
        return int(now[NOW_GENERATION]), int(now[NOW_STEP]), int(now[NOW_SLOT])

    def epoch(self) -> int:
        return int(self.state[EPOCH])


def noise(seed: int, shape: Sequence[int] = (1, 4, 4, 16, 16)) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def trajectory(seed: int, times: Sequence[float]) -> list[Tensor]:
    """Flow matching: clean video at time 0, noise at time 1000."""
    return [(1 - t / 1000) * noise(2 * seed) + t / 1000 * noise(2 * seed + 1) for t in times]


P, N = noise(100, (1, 8, 16)), noise(101, (1, 8, 16))
TIMES = [1000.0, 800.0, 600.0, 400.0, 200.0]


def test_steps_and_streams_are_counted() -> None:
    clock = Clock()
    calls = [clock.call(x, t, p) for x, t in zip(trajectory(0, TIMES), TIMES, strict=True) for p in (P, N)]
    assert calls == [(1, step, slot) for step in range(5) for slot in (0, 1)]


def test_streams_keep_their_slot_when_their_order_changes() -> None:
    clock, xs = Clock(), trajectory(0, TIMES)
    assert [clock.call(xs[0], TIMES[0], p)[2] for p in (P, N)] == [0, 1]
    assert [clock.call(xs[1], TIMES[1], p)[2] for p in (N, P)] == [1, 0]
    assert clock.call(xs[2], TIMES[2], N)[2] == 1  # guidance switched off: the prompt's call is left out


def test_equal_prompts_are_told_apart_by_order() -> None:
    clock, xs = Clock(), trajectory(0, TIMES)
    # Twice the same at first cannot be told from a run that was aborted and begins anew.
    assert [clock.call(xs[0], TIMES[0], P) for _ in range(2)] == [(1, 0, 0), (2, 0, 0)]
    for x, t in zip(xs[1:], TIMES[1:], strict=True):
        assert [clock.call(x, t, P)[2] for _ in range(2)] == [0, 1]


def test_an_aborted_run_that_begins_anew_is_a_new_generation() -> None:
    """The same noise, prompts and timestep: the weights may have changed in between."""
    clock, xs = Clock(), trajectory(0, TIMES)
    for number in (1, 2, 3):
        assert [clock.call(xs[0], TIMES[0], p) for p in (P, N)] == [(number, 0, 0), (number, 0, 1)]
    assert clock.call(xs[1], TIMES[1], P) == (3, 1, 0)


def test_timestep_turning_back_is_a_new_generation() -> None:
    clock, xs = Clock(), trajectory(0, TIMES)
    for x, t in zip(xs, TIMES, strict=True):
        clock.call(x, t, P)
    assert clock.call(xs[-1] + 0.01, 1000.0, P) == (2, 0, 0)


def test_unrelated_latents_are_a_new_generation_even_at_a_later_timestep() -> None:
    clock = Clock()
    clock.call(noise(1), 1000.0, P)
    assert clock.call(noise(2), 900.0, P) == (2, 0, 0)


def test_latents_of_another_size_are_a_new_generation() -> None:
    clock = Clock()
    clock.call(torch.ones(1, 4, 4, 16, 16), 1000.0, P)
    assert clock.call(torch.ones(1, 4, 4, 16, 24), 900.0, P)[0] == 2


def test_rising_time_counts_steps() -> None:
    """Lumina and Z-Image count from 0 to 1, Mochi from 0 to 1000."""
    clock = Clock()
    times = [1000.0, 900.0, 700.0, 400.0, 100.0]
    for generation in (1, 2):
        xs = trajectory(generation, times)
        calls = [clock.call(x, 1 - t / 1000, p) for x, t in zip(xs, times, strict=True) for p in (P, N)]
        assert calls == [(generation, step, slot) for step in range(5) for slot in (0, 1)]


def test_time_that_rose_and_falls_is_a_new_generation() -> None:
    clock, xs = Clock(), trajectory(0, TIMES)
    assert [clock.call(xs[0] * (1 + t), t, P)[:2] for t in (0.0, 0.1, 0.2)] == [(1, 0), (1, 1), (1, 2)]
    assert clock.call(xs[0] * 1.3, 0.1, P) == (2, 0, 0)
    assert clock.call(xs[0] * 1.4, 0.0, P) == (2, 1, 0)  # the new one's time falls


def test_a_rise_after_one_step_needs_latents_that_hardly_moved() -> None:
    """Video-to-video, aborted after its first step, and begun anew on the same clip with more noise."""
    clock, video = Clock(), noise(50)
    assert clock.call(0.7 * video + 0.3 * noise(1), 300.0, P) == (1, 0, 0)
    assert clock.call(0.5 * video + 0.5 * noise(2), 500.0, P) == (2, 0, 0)


@pytest.mark.parametrize("steps", [2, 3])
def test_rising_runs_of_a_few_steps_that_begin_anew_are_new_generations(steps: int) -> None:
    """Their second step moves so far that it counts as a new generation; a restart is not the next step after it."""
    times = [1000 * step / steps for step in range(2)]
    clock, (x, y) = Clock(), trajectory(0, [1000 - t for t in times])
    for run in range(3):
        assert clock.call(x, times[0], P) == (2 * run + 1, 0, 0)
        assert clock.call(y, times[1], P) == (2 * run + 2, 0, 0)


def test_latents_that_are_denoised_together_are_judged_together() -> None:
    video, sound = trajectory(0, TIMES), [x[:, :, 0] for x in trajectory(1, TIMES)]
    clock = Clock()

    def call(x: Tensor, y: Tensor, t: float) -> tuple[int, int]:
        now = advance(clock.state, [x, y], torch.tensor([t]), [P], STREAMS)
        return int(now[NOW_GENERATION]), int(now[NOW_STEP])

    calls = [call(*latents) for latents in zip(video[:3], sound[:3], TIMES[:3], strict=True)]
    assert calls == [(1, 0), (1, 1), (1, 2)]
    assert call(video[3], noise(9)[:, :, 0], TIMES[3]) == (2, 0)  # another sound


def test_second_evaluation_at_one_timestep_uses_no_state() -> None:
    """Heun evaluates each timestep but the first twice, on latents that differ a little."""
    clock, (x, y, z, *_) = Clock(), trajectory(0, TIMES)
    for p in (P, N):
        clock.call(x, 1000.0, p)
    assert [clock.call(y, 800.0, p) for p in (P, N)] == [(1, 1, 0), (1, 1, 1)]
    assert [clock.call(y + 0.02 * noise(9), 800.0, p) for p in (P, N)] == [(1, 1, -1), (1, 1, -1)]
    assert [clock.call(z, 600.0, p) for p in (P, N)] == [(1, 2, 0), (1, 2, 1)]


def test_prompts_mixed_into_the_latents_share_no_slot() -> None:
    clock = Clock()
    clock.call(trajectory(0, TIMES)[0], 1000.0, P)
    for step, x in enumerate(trajectory(0, TIMES)[1:], 1):
        assert clock.call(x + 0.1 * noise(7), TIMES[step], P) == (1, step, 0)
        assert clock.call(x + 0.1 * noise(8), TIMES[step], P) == (1, step, -1)


def test_first_timestep_again_on_other_latents_is_a_restart() -> None:
    clock, x = Clock(), noise(1)
    clock.call(x, 50.0, P)
    assert clock.call(x + 0.02 * noise(9), 50.0, P) == (2, 0, 0)


def test_one_replaced_entry_of_a_batch_is_a_new_generation() -> None:
    clock, xs, others = Clock(), [trajectory(i, TIMES) for i in range(8)], trajectory(99, TIMES)
    batches = [torch.cat([x[step] for x in xs]) for step in range(3)]
    assert clock.call(batches[0], 1000.0, P) == (1, 0, 0)
    assert clock.call(batches[1], 800.0, P) == (1, 1, 0)
    batches[2][5] = others[2][0]
    assert clock.call(batches[2], 600.0, P) == (2, 0, 0)


def test_more_entries_than_are_judged_singly() -> None:
    clock, xs = Clock(), [trajectory(i, TIMES) for i in range(50)]
    calls = [clock.call(torch.cat([x[step] for x in xs]), TIMES[step], P) for step in range(3)]
    assert calls == [(1, 0, 0), (1, 1, 0), (1, 2, 0)]


def test_equal_timestep_on_other_noise_is_a_new_generation() -> None:
    clock = Clock()
    for number, seed in enumerate((1, 2, 3), 1):
        assert clock.call(noise(seed), 1000.0, P) == (number, 0, 0)


def test_video_to_video_in_one_step_is_a_new_generation() -> None:
    """Same clean video, same strength, other noise: the latents correlate although nothing continues."""
    clock, video = Clock(), noise(50)
    clock.call(0.7 * video + 0.3 * noise(1), 300.0, P)
    assert clock.call(0.7 * video + 0.3 * noise(2), 300.0, P)[0] == 2


def test_conditioning_channels_do_not_hide_new_noise() -> None:
    """Image-to-video concatenates the given image to the latents; it stays while the noise changes."""
    clock, image = Clock(), 5 * noise(60)
    clock.call(torch.cat([noise(1), image], 1), 1000.0, P)
    assert clock.call(torch.cat([noise(2), image], 1), 1000.0, P)[0] == 2


def test_restart_from_the_first_latents_is_a_new_generation() -> None:
    """Same noise again after an abort, with a timestep that was rounded to the same value."""
    clock, x = Clock(), noise(1)
    clock.call(x, 1000.0, P)
    assert clock.call(x + 0.01 * noise(2), 996.0, P) == (1, 1, 0)
    assert clock.call(x, 996.0, P) == (2, 0, 0)


def test_another_prompt_never_gets_the_slot_of_the_first() -> None:
    """One step, then the same noise with another prompt: it looks like a second stream and must stay one."""
    clock, xs = Clock(), trajectory(0, TIMES)
    assert clock.call(xs[0], TIMES[0], P)[2] == 0
    assert [clock.call(x, t, N)[2] for x, t in zip(xs, TIMES, strict=True)] == [1] * 5


def test_prompts_that_differ_in_one_element_are_different() -> None:
    long = noise(0, (1, 512, 64))
    other = long.clone()
    other[0, -1, -1] += 0.5
    device = torch.device("cpu")
    assert torch.equal(identify([long], device), identify([long.clone()], device))
    assert not torch.equal(identify([long], device), identify([other], device))
    swapped = long[:, [1, 0, *range(2, 512)]]  # the same tokens in another order
    assert not torch.equal(identify([long], device), identify([swapped], device))
    assert not torch.equal(identify([long, P], device), identify([P, long], device))
    assert len(identify([P] * 40, device)) == 40 * CONDITION_WORDS


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), torch.finfo(torch.float32).min])
def test_masks_of_extreme_numbers_hide_nothing(bad: float) -> None:
    device = torch.device("cpu")
    mask = torch.zeros(1, 512)
    mask[0, 400:] = bad
    shorter = mask.clone()
    shorter[0, 399] = bad
    assert torch.equal(identify([mask], device), identify([mask.clone()], device))
    assert not torch.equal(identify([mask], device), identify([shorter], device))
    biased = mask.clone()
    biased[0, 3] = 1e-3
    assert not torch.equal(identify([mask], device), identify([biased], device))
    others = [torch.ones(4)] * 20
    assert not torch.equal(identify([P, *others, mask], device), identify([N, *others, mask], device))


def test_fingerprints_do_not_collide() -> None:
    device = torch.device("cpu")
    prints = set()
    for position in [*range(0, 20000, 7), 10, 2049, 10 + 4093, 10 + 4093 * 4093]:
        x = torch.zeros(position + 1)
        x[position] = 1
        prints.add(tuple(identify([x], device).tolist()))
    assert len(prints) == len({*range(0, 20000, 7), 10, 2049, 10 + 4093, 10 + 4093 * 4093})
    prompt = noise(0, (1, 512, 1024))
    for place in range(0, prompt.numel(), 50001):
        other = prompt.clone()
        other.view(-1)[place] *= 1.001
        assert not torch.equal(identify([prompt], device), identify([other], device))
    ids = torch.tensor([2**24, 5])
    assert not torch.equal(identify([ids], device), identify([ids + torch.tensor([1, 0])], device))
    assert not torch.equal(identify([3], device), identify([4], device))
    waves = torch.polar(torch.ones(8), torch.arange(8.0))
    assert not torch.equal(identify([waves], device), identify([waves.conj()], device))


def test_too_many_streams_get_no_slot() -> None:
    clock, x = Clock(max_streams=2), noise(1)
    prompts = [noise(200 + i, (1, 8, 16)) for i in range(3)]
    assert [clock.call(x, 1000.0, p)[2] for p in prompts] == [0, 1, -1]


def test_a_prompt_that_changes_every_step_takes_over_idle_slots_under_a_new_epoch() -> None:
    clock = Clock(max_streams=2)
    epochs, slots = [], []
    for index, x in enumerate(trajectory(0, TIMES)):
        slots.append(clock.call(x, TIMES[index], noise(300 + index, (1, 8, 16)))[2])
        epochs.append(clock.epoch())
    assert epochs == [1, 2, 3, 4, 5]
    assert slots == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_always_a_new_generation(bad: float) -> None:
    clock, x = Clock(), noise(1)
    x[0, 0, 0] = bad
    generations = [clock.call(x * factor, 1000.0 * factor, P)[0] for factor in (1.0, 0.99, 0.98)]
    assert generations == [1, 2, 3]


TIMESTEP_KINDS: dict[str, Callable[[float], Tensor]] = {
    "scalar": lambda t: torch.tensor(t),
    "integer": lambda t: torch.tensor([int(t)]),
    "batch_bfloat16": lambda t: torch.full((2,), t, dtype=torch.bfloat16),
    "per_token": lambda t: torch.tensor([[0.0, 0.0, t, t]]),
}
"""How pipelines hand a time to a model."""


@pytest.mark.parametrize("make", TIMESTEP_KINDS.values(), ids=TIMESTEP_KINDS)
def test_kinds_of_timestep(make: Callable[[float], Tensor]) -> None:
    clock = Clock()
    calls = [clock.call(x, make(t), P) for x, t in zip(trajectory(0, TIMES), TIMES, strict=True)]
    assert calls == [(1, step, 0) for step in range(5)]
    assert clock.call(noise(77), make(1000.0), P) == (2, 0, 0)


def test_conditions_of_any_dtype_and_layout() -> None:
    clock = Clock(conditions=4)
    conditions = (torch.ones(1, 8, dtype=torch.bool), torch.arange(8), P.transpose(1, 2), torch.zeros(0))
    assert clock.call(noise(1), 1000.0, *conditions) == (1, 0, 0)


def test_sample_reaches_all_of_a_tensor() -> None:
    x = torch.arange(1 << 20).float()
    values = sample(x, 4096)
    assert values.unique().numel() == 4096
    assert values.max() > 0.99 * x.numel()
    channels = values.long() % 64  # a stride that is a multiple of the channels would see one channel only
    assert channels.unique().numel() == 64


@pytest.mark.parametrize("size", [1, 3, 4095, 4097])
def test_sample_of_awkward_sizes(size: int) -> None:
    assert sample(torch.arange(size).half(), 4096).shape == (4096,)


def test_advance_needs_no_host_decision() -> None:
    """Traced to one graph of tensor operations: nothing is read back."""
    from torch.fx.experimental.proxy_tensor import make_fx

    clock = Clock()
    graph = make_fx(lambda c, x, t, p: advance(c, x, t, [p], STREAMS), tracing_mode="fake")(
        clock.state, noise(1), torch.tensor([1.0]), P
    )
    targets = {str(node.target) for node in graph.graph.nodes}
    assert not any(name in target for target in targets for name in ("_local_scalar_dense", ".item", "nonzero"))
