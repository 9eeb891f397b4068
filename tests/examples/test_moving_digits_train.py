"""Training, generating and evaluating on a model of two layers and videos of 80 tokens."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from moving_digits import evaluate, generate, measure_conditioning, train
from moving_digits.data import DIRECTIONS, Actor, parse_prompt
from moving_digits.measure_coherence import _kept, tile_gaps
from moving_digits.measure_prompts import evaluated_casts
from moving_digits.pipeline import SETTINGS, load_pipeline, read_metadata, sha256
from moving_digits.plots import draw_losses

TINY = replace(SETTINGS["small"], frames=5, side=16, layers=2)
RECIPE = train.Recipe(steps=4, batch=2, warmup=1)


@pytest.fixture(autouse=True)
def tiny_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "small", TINY)


def new_training(seed: int = 0) -> train.Training:
    return train.Training(TINY, RECIPE, seed, torch.device("cpu"), None)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    straight = new_training()
    for _ in range(RECIPE.steps):
        straight.train_step()
    first = new_training()
    first.train_step()
    first.train_step()
    torch.save(first.state(), tmp_path / "checkpoint.pt")
    second = new_training()
    second.load_state(train.read_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu")))
    for _ in train.remaining_steps(second, 0.0, math.inf):
        second.train_step()
    assert second.step == straight.step == RECIPE.steps
    for ours, expected in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert all(map(torch.equal, second.ema, straight.ema))


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 3, with checkpoints every 2: the same weights, and each step once in the log."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    one_step = train.Training.train_step

    def killed_after_three(training: train.Training) -> torch.Tensor:
        if training.step == 3:
            raise KeyboardInterrupt
        return one_step(training)

    def run(name: str) -> None:
        train.main(["--steps", "5", "--batch", "2", "--device", "cpu", "--output", str(tmp_path / name)])

    run("straight")
    monkeypatch.setattr(train.Training, "train_step", killed_after_three)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(train.Training, "train_step", one_step)
    assert [line.split(",")[0] for line in (tmp_path / "killed/log.csv").read_text().splitlines()] == ["1", "2", "3"]
    run("killed")
    losses = [
        [line.split(",")[:2] for line in (tmp_path / name / "log.csv").read_text().splitlines()]
        for name in ("straight", "killed")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list("12345")
    straight, killed = (load_file(tmp_path / name / "small.safetensors") for name in ("straight", "killed"))
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


def test_another_trainings_checkpoint_is_refused(tmp_path: Path) -> None:
    state = new_training().state()
    with pytest.raises(SystemExit, match="made with seed 0, not 1; name another --output"):
        new_training(seed=1).load_state(state)
    other_setting = train.Training(replace(TINY, name="long"), RECIPE, 0, torch.device("cpu"), None)
    with pytest.raises(SystemExit, match="made with setting small, not long"):
        other_setting.load_state(state)
    weights = tmp_path / "small.safetensors"
    new_training().save_average(weights)
    with pytest.raises(SystemExit, match=f"made with init random weights, not {sha256(weights)}"):
        train.Training(TINY, RECIPE, 0, torch.device("cpu"), None, weights).load_state(state)


def saved(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"junk", saved({"step": 3}), saved({"step": torch.ones(99)})[:-200]])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is no checkpoint"):
        train.main(["--steps", "1", "--batch", "1", "--device", "cpu", "--output", str(tmp_path)])


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    new_training(seed=5).save_average(path)
    training = train.Training(TINY, RECIPE, 0, torch.device("cpu"), None, path)
    given = load_file(path)
    for (name, parameter), average in zip(training.model.named_parameters(), training.ema, strict=True):
        assert torch.equal(parameter, given[name].float())
        assert torch.equal(average, parameter)
    training.save_average(tmp_path / "next.safetensors")
    assert read_metadata(tmp_path / "next.safetensors")["init"] == sha256(path)


def test_command_writes_weights_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "3", "--batch", "2", "--device", "cpu", "--output", str(tmp_path)]
    train.main(arguments)
    train.main(arguments)  # nothing is left to do
    assert "step 3 of 3" in capsys.readouterr().out
    weights = tmp_path / "small.safetensors"
    assert read_metadata(weights)["steps"] == "3"
    assert (tmp_path / "log.csv").read_text().count("\n") == 1
    checkpoint = train.read_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu"))
    names = [name for name, _ in train.Trainee(TINY).named_parameters()]
    average = dict(zip(names, checkpoint["ema"], strict=True))
    loaded = load_pipeline(weights).transformer
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, average[f"transformer.{name}"].to(torch.bfloat16).float()), name


def test_no_prompt_names_what_is_held_out() -> None:
    casts = [(Actor(*held_out), Actor(3, "up", None)) for held_out in train.HELD_OUT]
    kept = train.withhold(casts)
    assert [(a.digit, a.direction, a.speed) for a, _ in kept] == [(d, way, None) for d, way, _ in train.HELD_OUT]
    training = new_training()
    prompts = [prompt for _ in range(20) for prompt in training.batch()[1]]
    named = {(a.digit, a.direction, a.speed) for prompt in prompts if prompt for a in parse_prompt(prompt)}
    assert named
    assert not named & train.HELD_OUT
    assert "" in prompts


def test_rates_rise_hold_and_fall() -> None:
    recipe = train.Recipe(steps=100, batch=1, warmup=10, decay=0.5)
    factors = [train.rate_factor(step, recipe) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == 0.5
    assert 0 < factors[99] < 0.03


def test_generate_writes_a_gif(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train.main(["--steps", "1", "--batch", "1", "--device", "cpu", "--output", str(tmp_path)])
    weights = str(tmp_path / "small.safetensors")
    generate.main(
        ["--prompt", "3 right", "--backend", "eager", "--steps", "2", "--weights", weights, "--output", str(tmp_path)]
    )
    with Image.open(tmp_path / "3-right-0-eager.gif") as gif:
        assert gif.n_frames > 1
        assert gif.size == (4 * TINY.side, 4 * TINY.side)
    assert "s per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", "3 rihgt"], "nearest is 'right'"),
        (["--threshold", "2"], "threshold"),
        (["--steps", "1"], "--steps"),
    ],
)
def test_generate_names_what_is_wrong(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        generate.main([*arguments, "--output", str(tmp_path)])
    assert named in capsys.readouterr().err


def test_tile_gaps_are_the_least_distance_to_the_rows_maxima() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 256, 16)
    gaps = tile_gaps(q, k)
    scores = (q.double() @ k.double().mT) * 16**-0.5 / math.log(2)
    rows, keys = scores[1, 128:], scores[1, 128:, :128]
    expected = (rows.amax(1) - keys.amax(1)).min()
    assert gaps.shape == (2, 2, 2)
    assert abs(float(gaps[1, 1, 0]) - float(expected)) < 2e-3


def test_share_of_tiles_that_stay_negligible() -> None:
    negligible = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 1]], dtype=torch.bool)
    assert list(_kept(negligible, "1")) == [0.5, 1.0]
    assert list(_kept(negligible, "last")) == [0.5, 1.0]
    assert list(_kept(negligible, "5")) == []


def test_evaluated_prompts_cover_every_digit_and_direction() -> None:
    casts = evaluated_casts(pairs=5, seed=0)
    singles = [cast[0] for cast in casts if len(cast) == 1]
    assert {(a.digit, a.direction) for a in singles} == {(d, w) for d in range(10) for w in DIRECTIONS}
    assert sum((a.digit, a.direction, a.speed) in train.HELD_OUT for a in singles) == 40
    assert sum(len(cast) == 2 for cast in casts) == 5


@pytest.mark.parametrize("what", ["conditioning", "prompts"])
def test_evaluate_writes_results_and_their_conditions(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure_conditioning, "NOISE_LEVELS", (0.9, 0.99))
    train.main(["--steps", "1", "--batch", "1", "--device", "cpu", "--output", str(tmp_path)])
    weights = tmp_path / "small.safetensors"
    arguments = ["--steps", "2", "--batch", "4", "--pairs", "2", "--every", "30", "--output", str(tmp_path)]
    evaluate.main([what, "--weights", str(weights), *arguments])
    result = json.loads((tmp_path / f"{what}.json").read_text())
    assert result["conditions"]["weights"] == sha256(weights)[:12]
    if what == "conditioning":
        assert set(result["0.99"]) == {"right prompt", "another digit", "the opposite direction", "no prompt"}
        assert result["0.9"]["right prompt"] > 0
    else:
        assert result["one digit, all"]["singles"] > 0
        assert (tmp_path / "samples.gif").exists()


def test_loss_curves_are_drawn_from_logs(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("50,0.9,1.0\n100,0.5,2.0\n")
    draw_losses({"a run": tmp_path / "log.csv"}, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 300
