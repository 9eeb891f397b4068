"""Figures that the examples print are about the run at hand, whatever ran on the model before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from generation import Job
from moving_digits import measure_prompts, measure_thresholds
from moving_digits.identity_vae import LATENT_CHANNELS
from moving_digits.pipeline import SETTINGS, assemble_pipeline, build_transformer
from moving_digits.prompt_encoder import text_encoder
from moving_digits.sampling import Sampling

import lite_compile

SETTING = replace(SETTINGS["small"], frames=17, side=32, layers=1)
STEPS = 3


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def pipe() -> WanPipeline:
    """Untrained; its attention is made peaked, so that thresholds differ."""
    torch.manual_seed(0)
    transformer = build_transformer(SETTING)
    for block in transformer.blocks:
        block.attn1.norm_q.weight.fill_(6.0)
        block.attn1.norm_k.weight.fill_(6.0)
    built = assemble_pipeline(transformer, text_encoder(SETTING.text_dim), [0.0] * LATENT_CHANNELS, [1.0] * 12)
    built.set_progress_bar_config(disable=True)
    return built


def sampling(tmp_path: Path, **changes: Any) -> Sampling:
    given = {"steps": STEPS, "guidance": 4.0, "seed": 0, "batch": 3, "pairs": 0, "every": 100, "output": tmp_path}
    return Sampling(**{**given, **changes})


def test_each_threshold_is_measured_alone(pipe: WanPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_thresholds, "SHOWN_PROMPTS", ("3 right",))
    monkeypatch.setattr(measure_thresholds, "THRESHOLDS", (-10.0, 0.0))
    model = pipe.transformer
    found = measure_thresholds.measure_thresholds(pipe, SETTING, sampling(tmp_path))
    assert pipe.transformer is model
    assert lite_compile.stats(model).streams == ()
    together = {threshold: summary["density_last_step"] for threshold, summary in found["summary"].items()}
    assert together["-inf"] == 1.0
    monkeypatch.setattr(measure_thresholds, "THRESHOLDS", (0.0,))
    alone = measure_thresholds.measure_thresholds(pipe, SETTING, sampling(tmp_path))
    assert alone["summary"]["0.0"]["density_last_step"] == together["0.0"] < 1.0


def test_a_job_forgets_its_earlier_runs(pipe: WanPipeline) -> None:
    arguments = {
        "prompt": "3 right", "height": SETTING.side, "width": SETTING.side, "num_frames": SETTING.num_frames,
        "num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np",
    }  # fmt: skip
    job = Job(pipe, arguments, torch.device("cpu"))
    first = job.run("liteattention", {"threshold": 0.0, "inner": "eager"})
    never = job.run("liteattention", {"threshold": -float("inf"), "inner": "eager"})
    again = job.run("liteattention", {"threshold": 0.0, "inner": "eager"})
    assert set(never.densities[-1].values()) == {1.0}
    assert again.densities == first.densities
    assert min(first.densities[-1].values()) < 1.0
    assert pipe.transformer is job.denoisers["transformer"]


@pytest.mark.parametrize("every", [1000, 40])
def test_prompts_are_measured_however_few(pipe: WanPipeline, tmp_path: Path, every: int) -> None:
    """116 prompts: one, and an odd number of them."""
    found = measure_prompts.measure_prompts(pipe, SETTING, sampling(tmp_path, every=every))
    assert found["one digit, all"]["singles"] == len(range(0, 110, every))
    assert (tmp_path / "samples.gif").exists()
