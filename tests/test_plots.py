"""Pictures show the numbers that they are made of, and say what is missing when they cannot be drawn."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile.layer_stats import Stats, StreamStats
from lite_compile.step_errors import StepErrors

PROMPTS = [prompt(0), prompt(1)]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def entry(layer: str, stream: int, *history: float | None) -> StreamStats:
    return StreamStats(layer, stream, 0.5, len(history), 1, 1, 0, 100, history)


def test_heat_map_shows_each_layer_and_step_of_each_stream() -> None:
    pytest.importorskip("matplotlib")
    found = Stats((entry("a", 0, 1.0, 0.5), entry("b", 0, 1.0, None), entry("a", 2, 1.0, 0.25, 0.125)))
    figure = lite_compile.plot(found)
    first, second, colours = figure.axes
    shown = first.images[0].get_array().filled(math.nan).tolist()
    assert shown[0] == [1.0, 0.5]
    assert shown[1][0] == 1.0
    assert math.isnan(shown[1][1])
    assert second.images[0].get_array().tolist() == [[1.0, 0.25, 0.125]]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]
    assert first.get_title("left") == "stream 0: mean of the last step 0.50"
    assert second.get_title("left") == "stream 2: mean of the last step 0.12"
    assert colours.get_ylabel() == "share of tiles computed"


def test_what_was_dropped_is_shown_in_the_same_manner() -> None:
    pytest.importorskip("matplotlib")
    one = replace(entry("a", 0), dropped_mass=((0.0, 0.0), (0.25, 0.5), None))
    two = replace(entry("b", 0), dropped_mass=((0.0, 0.0), (0.125, 0.75)))
    figure = lite_compile.plot(Stats((one, two)), show="dropped_mass")
    axes, colours = figure.axes
    shown = axes.images[0].get_array().filled(-1).tolist()
    assert shown == [[0.0, 0.25, -1], [0.0, 0.125, -1]]
    assert axes.images[0].get_clim() == (0, 0.25)
    assert axes.get_title("left") == "stream 0: most of any sampled query 7.5e-01"
    assert colours.get_ylabel() == "share of the softmax dropped"
    with pytest.raises(ValueError, match=r"no dropped mass was recorded; compile with options=\{'probe': True\}"):
        lite_compile.plot(Stats((entry("a", 0, 1.0),)), show="dropped_mass")
    with pytest.raises(ValueError, match="show is 'errors'; allowed: 'density', 'dropped_mass', 'error'"):
        lite_compile.plot(Stats((one,)), show="errors")  # type: ignore[call-overload,unused-ignore]
    with pytest.raises(TypeError, match=r"model is Stats\(.* allowed with show='error': what measure_errors"):
        lite_compile.plot(Stats((one,)), show="error")


def test_error_per_step_is_shown_with_its_budget() -> None:
    pytest.importorskip("matplotlib")
    points = {"a": {0.0: 0.001, 0.5: 0.004}, "b": {0.5: 0.008}}
    errors = StepErrors.from_points("l1", points, {0.0: 0.005, 0.5: 0.007, 1.0: 0.01}, "made up")
    assert errors.worst == (0.001, 0.008)
    assert errors.met == 2 / 3
    figure = lite_compile.plot(errors)
    heat, lines, _ = figure.axes
    assert heat.images[0].get_array().filled(-1).tolist() == [[0.001, 0.004], [-1, 0.008]]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["a", "b"]
    worst, budget = lines.get_lines()
    assert worst.get_xydata().tolist() == [[0.0, 0.001], [0.5, 0.008]]
    assert budget.get_xydata().tolist() == [[0.0, 0.005], [0.5, 0.007]]
    assert figure.get_suptitle() == "made up"
    with pytest.raises(ValueError, match=r"no error was measured; run lite_compile.measure_errors"):
        lite_compile.plot(StepErrors("l1", (), ()))
    with pytest.raises(ValueError, match=r"no error was measured"):
        lite_compile.plot(torch.nn.Linear(2, 2), show="error")
    with pytest.raises(ValueError, match="show is 'density'; allowed for StepErrors: 'error'"):
        lite_compile.plot(errors, show="density")


def test_pictures_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = tiny_wan()
    run = compiled(model, history=True)
    with lite_compile.capture_attention(model, "blocks.0.attn1", step=4) as calls:
        denoise(run, noise(0), PROMPTS, 5)
    figure = lite_compile.plot(model, path=tmp_path / "density.png")
    history = next(s.history for s in lite_compile.stats(model).streams if s.layer == "blocks.0.attn1")
    assert figure.axes[0].images[0].get_array()[0].tolist() == list(history)
    figure = lite_compile.plot_attention(calls[1], head=1, path=str(tmp_path / "attention.svg"))
    weights, overlay = (axes.images[-1].get_array() for axes in figure.axes[:2])
    assert weights.shape == (512, 512)
    shown = torch.as_tensor(overlay[..., 3] > 0)
    assert torch.equal(shown, calls[1].skipped[0, 1])
    assert shown.any()
    assert "blocks.0.attn1, step 5, stream 1, head 1" in figure.get_suptitle()
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "attention.svg").read_text()
    q, k = torch.randn(2, 1, 2, 1024, 32)
    figure = lite_compile.plot_attention(model, "blocks.0.attn1", q, k, stream=1)
    assert "next step, stream 1, head 0" in figure.get_suptitle()


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_wan()
    with pytest.raises(ValueError, match="no compiled model has run yet"):
        lite_compile.plot(model)
    denoise(compiled(model), noise(0), PROMPTS, 2)
    with pytest.raises(ValueError, match=r"no density history was recorded; compile with options=\{'history': True\}"):
        lite_compile.plot(model)
    with pytest.raises(TypeError, match="needs layer, q and k"):
        lite_compile.plot_attention(model, "blocks.0.attn1")
    with pytest.raises(TypeError, match="allowed: a call that capture_attention caught"):
        lite_compile.plot_attention("blocks.0.attn1")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lite-compile\[plot\]'"):
        lite_compile.plot(Stats((entry("a", 0, 1.0),)))
