"""Prompts, videos and metrics of the moving digits."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from moving_digits.data import DIRECTIONS, Actor, VideoSampler, bounce, format_prompt, load_digits, parse_prompt
from moving_digits.metrics import Motion, evaluate, load_classifier, measure_motion, psnr, ssim


def sampler(split: str = "test", seed: int = 0, **changes: int) -> VideoSampler:
    return VideoSampler(split, torch.Generator().manual_seed(seed), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "actors"),
    [
        ("3 right", [Actor(3, "right")]),
        ("  7 UP fast and 2 left ", [Actor(7, "up", "fast"), Actor(2, "left")]),
        ("0 down slow and 9 up slow", [Actor(0, "down", "slow"), Actor(9, "up", "slow")]),
    ],
)
def test_prompts_are_parsed_and_written(text: str, actors: list[Actor]) -> None:
    assert parse_prompt(text) == tuple(actors)
    assert format_prompt(actors) == " ".join(text.lower().split())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "a digit is missing in an empty prompt"),
        ("three right", "nearest is '3'"),
        ("12 right", "'12'.*not a digit"),
        ("3", "a direction is missing after '3'"),
        ("3 rihgt", "'rihgt'.*allowed: right, left, up, down.*nearest is 'right'"),
        ("3 right fsat", "'fsat'.*nearest is 'fast'"),
        ("3 right slow fast", "'fast'.*allowed: and"),
        ("3 right and", "a digit is missing after 'and'"),
        ("3 right and 3 left", "twice"),
        ("3 right and 4 left and 5 up", "ends after its second"),
    ],
)
def test_wrong_prompts_name_the_word(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_prompt(text)


def test_splits_share_no_image_and_hold_every_class() -> None:
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    seen = {tuple(image.flatten().tolist()) for image in train}
    assert not any(tuple(image.flatten().tolist()) in seen for image in test)
    shares = test_labels.bincount() / (train_labels.bincount() + test_labels.bincount())
    assert ((shares - 0.2).abs() < 0.01).all()
    assert float(train.min()) == 0.0
    assert float(train.max()) == 1.0


def test_same_seed_same_videos() -> None:
    (first, prompts), (again, prompts_again) = sampler(seed=3).sample(4), sampler(seed=3).sample(4)
    other, _ = sampler(seed=4).sample(4)
    assert prompts == prompts_again
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 17, 64, 64)
    assert first.dtype == torch.float32
    assert float(first.min()) >= -1.0
    assert float(first.max()) <= 1.0


def test_frames_of_chosen_times_are_frames_of_the_video() -> None:
    casts = [(Actor(3, "right"),), (Actor(1, "up"), Actor(8, "left"))]
    whole = sampler().render(casts)
    part = sampler().render(casts, torch.tensor([[0, 16], [5, 7]]))
    torch.testing.assert_close(part[0], whole[0][:, [0, 16]], rtol=0, atol=1e-5)
    torch.testing.assert_close(part[1], whole[1][:, [5, 7]], rtol=0, atol=1e-5)


def test_videos_look_the_same_at_any_side() -> None:
    casts = [(Actor(3, "right", "fast"), Actor(7, "down"))]
    small, large = sampler().render(casts), sampler(side=128).render(casts)
    shrunk = F.interpolate(large[0].transpose(0, 1), scale_factor=0.5, mode="area").transpose(0, 1)
    assert float((shrunk - small[0]).abs().mean()) < 0.02


def test_bounce_reflects() -> None:
    room = torch.tensor(10.0)
    positions = bounce(torch.tensor([0.0, 4.0, 10.0, 13.0, 20.0, 25.0, -3.0]), room)
    assert positions.tolist() == [0.0, 4.0, 10.0, 7.0, 0.0, 5.0, 3.0]


def test_digits_stay_inside_while_they_bounce() -> None:
    bright = sampler(seed=1, frames=60).render([(Actor(0, "right", "fast"),)] * 4).amax(1) > 0.6
    area = bright.float().mean((2, 3))
    assert float(area.min()) > 0.6 * float(area.mean())
    border = torch.cat([bright[:, :, 0], bright[:, :, -1], bright[:, :, :, 0], bright[:, :, :, -1]], -1)
    assert float(border.float().mean()) < 0.01


def test_rendered_videos_show_what_their_prompts_say() -> None:
    casts = [
        (Actor(d, way, speed),) for d in range(10) for way, speed in zip(DIRECTIONS, ("fast", "slow") * 2, strict=True)
    ]
    videos = sampler(seed=7).render(casts)
    found = evaluate(videos, casts, load_classifier())
    assert found.singles == 40
    assert found.single_accuracy >= 0.95
    assert found.direction_accuracy >= 0.95
    assert found.steadiness >= 0.95
    assert found.named_speeds == 40
    assert found.speed_accuracy >= 0.95
    opposite, other_speed = (
        {"right": "left", "left": "right", "up": "down", "down": "up"},
        {"slow": "fast", "fast": "slow"},
    )
    wrong = [(Actor((a.digit + 1) % 10, opposite[a.direction], other_speed[str(a.speed)]),) for (a,) in casts]
    mistaken = evaluate(videos, wrong, load_classifier())
    assert mistaken.single_accuracy <= 0.05
    assert mistaken.direction_accuracy <= 0.05
    assert mistaken.speed_accuracy <= 0.05
    unspecified = evaluate(videos[:1], [(replace(casts[0][0], speed=None),)], load_classifier())
    assert (unspecified.named_speeds, unspecified.speeds) == (0, 0)
    assert math.isnan(unspecified.speed_accuracy)


@pytest.mark.parametrize(
    ("times", "steady"),
    [
        (range(17), True),
        ([*range(6), *[5] * 11], False),  # it stops
        ([*range(8), *range(13, 22)], False),  # it jumps
        ([float(t) if t < 6 else 5 + 3.0 * (t - 5) for t in range(17)], False),  # it speeds up
    ],
    ids=["steady", "stops", "jumps", "speeds up"],
)
def test_motion_is_judged_to_the_end(times: Sequence[float], steady: bool) -> None:
    """Direction and speed are those of the start; a model may still lose its digit later."""
    video = sampler(seed=5).render([(Actor(3, "right", "slow"),)], torch.tensor([list(times)]))[0]
    assert measure_motion(video) == Motion("right", "slow", steady)


def test_a_digit_that_vanishes_does_not_move_steadily() -> None:
    video = sampler(seed=5).render([(Actor(3, "right", "slow"),)])[0]
    video[:, 10] = video[:, 0].amin()
    assert measure_motion(video) == Motion("right", "slow", False)


def test_videos_of_pairs_show_both_digits() -> None:
    drawn = [cast for cast in sampler(seed=2).draw_casts(60) if len(cast) == 2][:16]
    found = evaluate(sampler(seed=2).render(drawn), drawn, load_classifier())
    assert found.pairs == len(drawn)
    assert found.pair_accuracy >= 0.85


def test_no_motion_is_found_where_there_is_none() -> None:
    still = sampler().render([(Actor(3, "right"),)], torch.zeros(1, 17))[0]
    assert measure_motion(still) is None
    assert measure_motion(torch.full((3, 17, 64, 64), -0.8)) is None


def test_motion_of_a_square() -> None:
    for name, (x, y) in DIRECTIONS.items():
        video = torch.full((3, 17, 64, 64), -0.9)
        for t in range(17):
            top, left = 24 + y * t, 24 + x * t
            video[0, t, top : top + 14, left : left + 14] = 1.0
        assert measure_motion(video) == Motion(name, "slow", True)


def constant(value: float) -> Tensor:
    return torch.full((3, 2, 16, 16), value)


def test_psnr_and_ssim_of_known_differences() -> None:
    assert math.isclose(float(psnr(constant(0.5), constant(0.6), (0, 1))), 20.0, rel_tol=1e-4)
    assert math.isclose(float(psnr(constant(0.0), constant(0.2), (-1, 1))), 20.0, rel_tol=1e-4)
    assert math.isinf(float(psnr(constant(0.5), constant(0.5), (0, 1))))
    noise = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert math.isclose(float(ssim(noise, noise, (0, 1))), 1.0, rel_tol=1e-5)
    # Without variance only the luminance term is left.
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert math.isclose(float(ssim(constant(0.2), constant(0.8), (0, 1))), expected, rel_tol=1e-4)
    assert float(ssim(noise, 1 - noise, (0, 1))) < -0.5
