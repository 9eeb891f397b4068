"""benchmarks/compare_methods.py from end to end, on an untrained model that is small."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

import compare_methods  # noqa: E402
from diffusers import WanPipeline  # noqa: E402
from fidelity_runs import lite_methods  # noqa: E402
from moving_digits.data import parse_prompt  # noqa: E402
from moving_digits.identity_vae import LATENT_CHANNELS  # noqa: E402
from moving_digits.pipeline import SETTINGS, assemble_pipeline, build_transformer  # noqa: E402
from moving_digits.prompt_encoder import text_encoder  # noqa: E402

SETTING = replace(SETTINGS["small"], frames=17, side=32, layers=1)
STEPS = 3


def pipeline(*_: Any) -> WanPipeline:
    """Untrained; all queries and keys are nearly alike, so that by their rotation near tokens attend to each other."""
    torch.manual_seed(0)
    transformer = build_transformer(SETTING)
    for block in transformer.blocks:
        for projection in (block.attn1.to_q, block.attn1.to_k):
            projection.bias.data.fill_(3.0)
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.fill_(1.5)
    return assemble_pipeline(transformer, text_encoder(SETTING.text_dim), [0.0] * LATENT_CHANNELS, [1.0] * 12)


def run(path: Path) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_methods, "load_pipeline", pipeline)
        patch.setattr(compare_methods, "SETTINGS", {"small": SETTING})
        arguments = ["--prompts", "2", "--batch", "1", "--steps", str(STEPS), "--densities", "0.8"]
        compare_methods.main([*arguments, "--json", str(path)])
    torch._dynamo.reset()
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("compared") / "found.json")


def test_methods_are_compared_at_one_density(found: list[dict[str, Any]]) -> None:
    dense, unskipped, *rows = found
    assert (dense["method"], dense["psnr_mean"], dense["ssim_worst"]) == ("dense", None, 1.0)
    assert unskipped["density"] == 1.0
    assert unskipped["psnr_worst"] > 80
    lite = [method.name for method in lite_methods()]
    assert [row["method"] for row in rows] == [*lite, "radial", "radial", "sparse-video-gen", "sparse-video-gen"]
    assert [row.get("dense_steps") for row in rows[len(lite) :]] == [1, 0, 1, 0]
    assert rows[0]["density"] == pytest.approx(0.8, abs=0.02)
    for row in rows[len(lite) :]:
        assert row["density"] == pytest.approx(rows[0]["density"], abs=0.01)
    for row in rows:
        assert row["psnr_worst"] <= row["psnr_mean"] < unskipped["psnr_mean"]
        assert len(row["psnr"]) == row["digits_of"] == 2


@pytest.mark.slow
def test_the_same_run_twice_finds_the_same(found: list[dict[str, Any]], tmp_path: Path) -> None:
    for one, other in zip(found, run(tmp_path / "again.json"), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_prompts_are_valid_and_differ() -> None:
    prompts = compare_methods.chosen_prompts(12)
    assert len(set(prompts)) == 12
    assert [len(parse_prompt(prompt)) for prompt in prompts[:4]] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--densities", "0.2"], "0.2 is no more than 8 dense steps of 30 alone are"),
        (["--densities", "1"], "'1' is not from 0 to below 1"),
        (["--calibration", "nowhere.toml"], "there is no file 'nowhere.toml'"),
        (["--prompts", "0"], "'0' is not an integer from 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_methods.parse_arguments(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
