"""Targets for whole generations."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from models import compiled, denoise, noise, prompt, tiny_wan
from moving_digits import metrics

import lite_compile
from lite_compile.calibration.journal import Journal
from lite_compile.calibration.quality import psnr, read_output, ssim, value_range
from lite_compile.calibration.target import (
    BELOW_THE_MEAN,
    QualityRuns,
    QualityTarget,
    calibration_prompt,
    lower_bound_of_others,
)

STEPS = 5


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def test_thresholds_meet_a_psnr_and_nothing_else_is_needed(tmp_path: Path) -> None:
    model = tiny_wan()
    call = compiled(model)

    def run(number: int) -> Tensor:
        return denoise(call, noise(number), [prompt(number), prompt(99)], STEPS)

    target = 85.0
    found = lite_compile.calibrate(
        model, run, 0.05, out=tmp_path / "wan.toml", prompts=[0, 1], target_psnr=target, held_out=[7]
    )
    assert found.quality is not None
    assert found.quality.scale < 1  # 0.05 alone is too bold for it
    lite_compile.set_threshold(model, -math.inf)
    dense = {number: run(number) for number in (0, 1, 7)}
    lite_compile.set_threshold(model, tmp_path / "wan.toml")
    measured = []
    for number, expected in dense.items():
        error = (run(number) - expected).double().square().mean()
        measured.append(float(10 * torch.log10((expected.max() - expected.min()) ** 2 / error)))
    assert min(measured[:2]) >= target
    assert measured == pytest.approx([*found.quality.calibration, *found.quality.held_out], abs=0.5)
    assert found.density < 0.99
    text = (tmp_path / "wan.toml").read_text()
    assert "[quality]" in text
    assert 'measure = "psnr"' in text
    assert "psnr (held out)" in str(found)


def test_a_target_that_cannot_be_met_and_a_run_without_a_seed() -> None:
    model = tiny_wan(layers=1)
    call = compiled(model)
    count = iter(range(1000))
    with pytest.raises(ValueError, match=r"two dense generations of run.* fix its seed"):
        lite_compile.calibrate(model, lambda: denoise(call, noise(next(count)), [prompt(0)], 3), target_psnr=30)
    # After the survey, the search and a second dense one, each generation has noise that the target does not allow.
    runs = iter(range(1000))

    def noisy() -> Tensor:
        result = denoise(call, noise(0), [prompt(0)], 3)
        return result if next(runs) < 3 else result + 0.5 * torch.randn_like(result)

    with pytest.raises(ValueError, match="target_psnr is 60: no thresholds that were tried meet it"):
        lite_compile.calibrate(model, noisy, target_psnr=60)


def test_a_run_that_writes_its_results_in_place() -> None:
    model = tiny_wan(layers=1)
    call = compiled(model)

    def run(number: int) -> Tensor:
        return denoise(call, noise(number), [prompt(number)], STEPS).double()

    def in_place(number: int) -> Tensor:
        return buffer.copy_(run(number))

    buffer = torch.empty_like(noise(0), dtype=torch.float64)
    found, expected = (lite_compile.calibrate(model, f, prompts=[0, 1, 2], target_psnr=80) for f in (in_place, run))
    assert found.quality == expected.quality
    assert max(expected.quality.calibration) < math.inf


@pytest.mark.parametrize(
    ("spoil", "target", "error", "message"),
    [
        (lambda result: None, {"target_psnr": 30}, TypeError, "let it return what"),
        (lambda result: result * math.nan, {"target_psnr": 30}, ValueError, "not finite, with dense attention"),
        (lambda result: result[..., :4], {"target_ssim": 0.9}, ValueError, "11 x 11 or more"),
    ],
)
def test_results_that_cannot_be_compared_are_told_at_the_first_generation(
    spoil: Callable[[Tensor], Any], target: dict[str, float], error: type[Exception], message: str
) -> None:
    model = tiny_wan(layers=1)
    call = compiled(model)
    runs = []

    def run() -> Any:
        runs.append(denoise(call, noise(0), [prompt(0)], 3))
        return spoil(runs[-1])

    with pytest.raises(error, match=message):
        lite_compile.calibrate(model, run, **target)
    assert len(runs) == 1


def test_a_run_that_does_not_return_what_the_model_made_is_told() -> None:
    model = tiny_wan(layers=1)
    call = compiled(model)

    def run() -> Tensor:
        denoise(call, noise(0), [prompt(0)], STEPS)
        return noise(1)

    with pytest.warns(UserWarning, match="equals dense generations, though attention was skipped: does it"):
        lite_compile.calibrate(model, run, target_psnr=30)


def test_scales_that_were_tried_before_a_crash_are_not_tried_again(tmp_path: Path) -> None:
    model = tiny_wan(layers=1)
    call = compiled(model)
    calls: list[int] = []

    def run(number: int) -> Tensor:
        calls.append(number)
        if len(calls) == crash:
            raise OSError("power cut")
        return denoise(call, noise(number), [prompt(number)], STEPS)

    def calibrate(out: Path | None) -> lite_compile.Calibration:
        return lite_compile.calibrate(model, run, 0.1, out=out, prompts=[0, 1, 2], target_psnr=80)

    crash = 0
    expected = calibrate(None)
    assert expected.quality is not None
    total = len(calls)
    # Survey, two searches, dense 0 again, three generations under the first scale with dense 1 and 2 among them: nine.
    calls, crash = [], 10
    with pytest.raises(OSError, match="power cut"):
        calibrate(tmp_path / "wan.toml")
    done = json.loads((tmp_path / "wan.toml.partial").read_text())["done"]
    assert sum(name.startswith("scale") for name in done) == 3
    calls, crash = [], 0
    found = calibrate(tmp_path / "wan.toml")
    assert (found.thresholds, found.quality, found.cost) == (expected.thresholds, expected.quality, expected.cost)
    assert len(calls) <= total - 9 + 3, "the nine were not done again, but for the dense generations"


def test_what_run_may_return() -> None:
    frames = np.random.default_rng(0).random((2, 5, 16, 24, 3))
    expected = torch.from_numpy(frames).movedim(-1, -3)
    assert torch.equal(read_output(frames), expected)
    assert torch.equal(read_output(SimpleNamespace(frames=frames)), expected)
    assert torch.equal(read_output(SimpleNamespace(images=list(frames))), expected)
    assert torch.equal(read_output((torch.ones(1, 4, 8, 8),)), torch.ones(1, 4, 8, 8).double())
    from PIL import Image

    images = [Image.fromarray((frame * 255).astype("uint8")) for frame in frames[0]]
    assert read_output(SimpleNamespace(frames=[images])).shape == (5, 3, 16, 24)
    assert value_range(SimpleNamespace(frames=[images]), expected, None) == 255
    assert value_range(frames, expected, None) == float(expected.max() - expected.min())
    assert value_range(frames, expected, (-1, 1)) == 2
    for wrong, named in ((None, "let it return what"), ("x", "str"), ([], "list"), (torch.ones(3), r"\(3,\)")):
        with pytest.raises(TypeError, match=named):
            read_output(wrong)


def test_measures_against_those_of_the_examples() -> None:
    a, b = torch.rand(2, 3, 4, 20, 30, generator=torch.Generator().manual_seed(0))
    b = a + 0.1 * b
    assert psnr(a.double(), b.double(), 1.0) == pytest.approx(float(metrics.psnr(a, b, (0, 1))), rel=1e-5)
    assert ssim(a.double(), b.double(), 1.0) == pytest.approx(float(metrics.ssim(a, b, (0, 1))), rel=1e-4)
    assert psnr(a, a, 1.0) == math.inf
    assert ssim(a.double(), a.double(), 1.0) == pytest.approx(1)
    assert psnr(a, b, 0.0) < -5000, "a dense result of one value"
    b[0, 0, 0, 0] = math.nan
    assert psnr(a.double(), b.double(), 1.0) == ssim(a.double(), b.double(), 1.0) == -math.inf
    with pytest.raises(ValueError, match="11 x 11 or more, not 4 x 4"):
        ssim(torch.ones(1, 4, 4), torch.ones(1, 4, 4), 1.0)


@pytest.mark.parametrize(
    ("values", "met"),
    [([30.0], True), ([29.9], False), ([31.0, 31.1, 30.9], True), ([30.1, 36.0, 33.0], False), ([math.inf] * 3, True)],
)
def test_the_spread_of_few_generations_counts(values: list[float], met: bool) -> None:
    target: Any = QualityTarget("psnr", 30.0, None)
    assert (target.room(target.bound(values)) >= 0) is met


def test_room_for_larger_errors() -> None:
    assert QualityTarget("psnr", 30.0, None).room(30 + 20 * math.log10(8)) == pytest.approx(3)
    assert QualityTarget("ssim", 0.9, None).room(0.975) == pytest.approx(1)
    exact = QualityTarget("ssim", 1.0, None)
    assert (exact.room(1.0), exact.room(0.99)) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("name", "value", "noise", "same"),
    [
        ("psnr", 30.0, 10**-3.1, True),  # 62 dB of 60
        ("psnr", 30.0, 10**-2.9, False),
        ("psnr", 50.0, 10**-3.6, True),  # 72 dB of 70
        ("psnr", 50.0, 10**-3.4, False),
        ("ssim", 0.9, 0.01, True),
        ("ssim", 0.9, 0.2, False),
    ],
)
def test_how_far_dense_generations_may_differ(name: str, value: float, noise: float, same: bool) -> None:
    plain = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    other = plain + noise * torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).double()
    generations: Any = SimpleNamespace(observe=lambda prompt, handle: other)
    target = QualityTarget(name, value, (0.0, 1.0))
    dense = {calibration_prompt(0): target.read_dense(plain)}
    runs = QualityRuns(target, generations, lambda x: None, Journal(None, {}), dense)
    with contextlib.nullcontext() if same else pytest.raises(ValueError, match="two dense generations of run"):
        runs.check_repeatable(None)


def test_where_the_search_begins() -> None:
    psnr_targets = [QualityTarget("psnr", value, None).first_error(0.05) for value in (10.0, 30.0, 90.0)]
    assert psnr_targets == pytest.approx([0.1, 10**-1.5 / 2, 0.00625])
    assert QualityTarget("ssim", 0.9, None).first_error(0.05) == 0.05


def student(t: float, freedom: int, shift: float) -> float:
    """Cumulative distribution of Student's t, noncentral by `shift`: normal over chi."""
    x = np.linspace(1e-9, 12 + math.sqrt(freedom), 20_001)
    density = np.exp((1 - freedom / 2) * math.log(2) + (freedom - 1) * np.log(x) - x**2 / 2 - math.lgamma(freedom / 2))
    normal = torch.special.ndtr(torch.from_numpy(t * x / math.sqrt(freedom) - shift))
    return float(torch.trapezoid(torch.from_numpy(density) * normal, torch.from_numpy(x)))


@pytest.mark.parametrize("count", range(2, len(BELOW_THE_MEAN) + 2))
def test_limits_are_those_of_the_normal_distribution(count: int) -> None:
    def holds(limit: float) -> bool:
        another = student(limit / math.sqrt(1 + 1 / count), count - 1, 0.0)
        confident = student(limit * math.sqrt(count), count - 1, 1.644854 * math.sqrt(count))
        return another >= 0.95 and confident >= 0.75

    limit = BELOW_THE_MEAN[count - 2]
    assert holds(limit)
    assert not holds(limit - 0.01)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 9, 12, 20])
def test_95_percent_of_other_prompts_are_above_the_bound(count: int) -> None:
    mean, spread = 30.0, 4.0
    draws = np.random.default_rng(count).normal(mean, spread, (20_000, count + 1))
    bounds = np.array([lower_bound_of_others(given[:-1].tolist()) for given in draws])
    another = float(np.mean(bounds < draws[:, -1]))
    confident = float(np.mean(bounds < mean - 1.6449 * spread))  # which 95 % of all exceed
    assert another > 0.944
    assert confident > 0.744
    if count <= 12:
        assert min(another - 0.95, confident - 0.75) < 0.012, "no more careful than has to be"
