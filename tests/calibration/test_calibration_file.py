"""The calibration file as an option: what it gives, and each way in which it may not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import compiled, denoise, noise, prompt, tiny_wan
from test_regional import compile_blocks, compile_whole

import lite_compile
from lite_compile import OptionTypeError, OptionValueError, Schedule
from lite_compile.calibration.calibration_file import LayerColumn, write_calibration
from lite_compile.calibration.fingerprint import fingerprint
from lite_compile.options import Options

LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
FRACTIONS = (0.0, 0.25, 1.0)


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def write(path: Path, layers: tuple[str, ...] = LAYERS, threshold: float = -2.0, **model: Any) -> Path:
    """A file for the tiny Wan."""
    made = fingerprint(tiny_wan())
    tables = {
        "calibration": {"criterion": "max", "metric": "l1", "date": 'a "quoted" day', "met": 1.0},
        "model": {"class": made.name, "parameters": made.parameters, "digest": made.digest, **model},
    }
    nan = float("nan")
    columns = {
        name: LayerColumn((-float("inf"), threshold - 1, threshold), (0.0, 1e-5, nan), (1.0, 0.5, nan))
        for name in layers
    }
    write_calibration(path, tables, FRACTIONS, (0.1, 0.2, 0.3), columns)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "wan.toml", ('odd "name".0', "blocks.1"))
    found = lite_compile.load_calibration(path)
    assert dict(found.layers) == {
        name: Schedule(FRACTIONS, (-float("inf"), -3.0, -2.0)) for name in ('odd "name".0', "blocks.1")
    }
    assert found == Options(threshold=path).threshold == Options(threshold=str(path)).threshold
    assert hash(found) == hash(lite_compile.load_calibration(str(path)))
    assert Options(threshold=found).threshold is found
    assert "wan.toml" in repr(found)
    measured = found.measured
    assert measured is not None
    assert (measured.metric, measured.fractions, measured.budget) == ("l1", (0.0, 0.25), (0.1, 0.2))
    assert measured.layers == (('odd "name".0', (0.0, 1e-5)), ("blocks.1", (0.0, 1e-5)))
    assert measured.met == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("errors = [0.0, 1e-05, nan]", "errors = [0.0, -1e-05, nan]", "'errors' of layer 'blocks.0.attn1' is no list"),
        ("errors = [0.0, 1e-05, nan]", "errors = [0.0]", "'errors' of layer 'blocks.0.attn1' is no list"),
        ("errors = [0.0, 1e-05, nan]", 'errors = ["x", 1, 2]', "'errors' of layer 'blocks.0.attn1' is no list"),
        ("budget = ", "budget = 3 #", r"'budget' in \[trajectory\] is no list of numbers >= 0 \(nan: unknown\)"),
    ],
)
def test_errors_in_a_file_are_read_or_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path / "wan.toml")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(OptionValueError, match=message):
        lite_compile.load_calibration(path)
    kept = [line for line in text.splitlines() if not line.startswith(("errors", "budget"))]
    path.write_text("\n".join(kept))
    assert lite_compile.load_calibration(path).measured is None
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
@pytest.mark.parametrize("as_object", [True, False])
def test_a_file_or_what_it_holds_is_an_option(tmp_path: Path, compile_model: Any, as_object: bool) -> None:
    path = write(tmp_path / "wan.toml")
    model, by_hand = tiny_wan(), tiny_wan()
    given: Any = lite_compile.load_calibration(path) if as_object else path
    result = denoise(compile_model(model, threshold=given), noise(0), [prompt(0)], 5)
    plain = {name: Schedule(FRACTIONS, (-float("inf"), -3.0, -2.0)) for name in LAYERS} | {"*": -1}
    assert torch.equal(result, denoise(compile_model(by_hand, threshold=plain), noise(0), [prompt(0)], 5))
    assert lite_compile.stats(model).density < 1


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_another_file_compiles_nothing(tmp_path: Path, compile_model: Any) -> None:
    model = tiny_wan()
    run = compile_model(model, threshold=write(tmp_path / "a.toml", threshold=-20.0))
    denoise(run, noise(0), [prompt(0)], 5)
    careful, graphs = lite_compile.stats(model).density, counters["stats"]["unique_graphs"]
    lite_compile.set_threshold(model, write(tmp_path / "b.toml", threshold=-0.5))
    denoise(run, noise(0), [prompt(0)], 5)
    assert lite_compile.stats(model).density < careful
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompiles"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "threshold: -3\n", "it is no TOML"),
        (lambda text: text.replace("format = 1", "format = 7"), "its 'format' is 7, this version .* reads 1"),
        (lambda text: text.replace("format = 1", ""), "its 'format' is None"),
        (
            lambda text: text.replace("-2.0]", "2.0]"),
            r"layer 'blocks.0.attn1': the value is 2.0; allowed: a number <= 0",
        ),
        (lambda text: text.replace("-2.0]", "nan]"), "layer 'blocks.0.attn1': the value is nan"),
        (lambda text: text.replace("-2.0]", '"x"]'), "layer 'blocks.0.attn1': the value is 'x'"),
        (lambda text: text.replace("[0.0, 0.25, 1.0]", "[0.0, 0.25, 0.2]"), "which rise from 0 to 1"),
        (lambda text: text.replace("[0.0, 0.25, 1.0]", "[0.25, 0.0, 1.0]"), "which rise from 0 to 1"),
        (lambda text: text.replace("[0.0, 0.25, 1.0]", "[0.0, 1.0]"), "as many fractions as thresholds"),
        (lambda text: text.replace("fractions =", "parts ="), r"\[trajectory\] has no list 'fractions'"),
        (lambda text: text.replace("thresholds =", "limits ="), "layer 'blocks.0.attn1' has no list 'thresholds'"),
        (lambda text: text.replace("[model]", "[modell]"), r"it has no table \[model\]"),
        (
            lambda text: text.replace('criterion = "max"', 'criterion = "min"'),
            r"'criterion' .* is 'min', not one of max, mass",
        ),
        (lambda text: text.replace("digest =", "hash ="), r"\[model\] lacks class, parameters or digest"),
        (lambda text: text[: text.index("[layers")] + "[layers]\n", r"\[layers\] is empty"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, spoil: Callable[[str], str], message: str) -> None:
    path = write(tmp_path / "wan.toml")
    spoiled = spoil(path.read_text())
    assert spoiled != path.read_text()
    path.write_text(spoiled)
    with pytest.raises(OptionValueError, match=message) as caught:
        Options(threshold=path)
    assert "wan.toml" in str(caught.value)
    assert "threshold" in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OptionValueError, match=r"'wann.toml': there is no such file"):
        denoise(compiled(tiny_wan(), threshold="wann.toml"), noise(0), [prompt(0)], 2)
    with pytest.raises(OptionValueError, match="it cannot be read"):
        Options(threshold=tmp_path)
    binary = tmp_path / "weights.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionValueError, match="it cannot be read"):
        Options(threshold=binary)
    with pytest.raises(OptionTypeError, match="'-10'"):
        Options(threshold="-10")


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_layers_that_are_missing_or_unknown(tmp_path: Path, compile_model: Any) -> None:
    missing = write(tmp_path / "missing.toml", ("blocks.0.attn1",))
    with pytest.raises(
        OptionValueError, match=r"no thresholds for layer 'blocks.1.attn1' \(did you mean 'blocks.0.attn1'\?\)\."
    ):
        denoise(compile_model(tiny_wan(), threshold=missing), noise(0), [prompt(0)], 2)
    torch._dynamo.reset()
    unknown = write(tmp_path / "unknown.toml", (*LAYERS, "blocks.2.attn1", "blocks.7.attn9"))
    with pytest.raises(OptionValueError, match=r"does not have its 2 layers 'blocks.2.attn1' \(did you mean") as caught:
        denoise(compile_model(tiny_wan(), threshold=unknown), noise(0), [prompt(0)], 2)
    assert "'blocks.7.attn9'" in str(caught.value)


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_the_file_of_another_model(tmp_path: Path, compile_model: Any) -> None:
    path = write(tmp_path / "wan.toml")
    with pytest.raises(OptionValueError, match=r"it was made for WanTransformer3DModel with .*, this is Wan"):
        denoise(compile_model(tiny_wan(layers=3), threshold=path), noise(0), [prompt(0)], 2)
    torch._dynamo.reset()
    other = write(tmp_path / "other.toml", **{"class": "FluxTransformer"})
    with pytest.raises(
        OptionValueError, match=r"it was made for FluxTransformer with .*, this is WanTransformer3DModel"
    ):
        denoise(compile_model(tiny_wan(), threshold=other), noise(0), [prompt(0)], 2)


def test_set_threshold_refuses_what_does_not_fit_and_changes_nothing(tmp_path: Path) -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-3.0)
    before = denoise(run, noise(0), [prompt(0)], 4)
    for path in (
        write(tmp_path / "missing.toml", ("blocks.0.attn1",)),
        write(tmp_path / "unknown.toml", (*LAYERS, "blocks.5.attn1")),
        write(tmp_path / "other.toml", digest="0123456789abcdef"),
        tmp_path / "none.toml",
    ):
        with pytest.raises(OptionValueError, match=path.name):
            lite_compile.set_threshold(model, path)
    assert torch.equal(denoise(run, noise(0), [prompt(0)], 4), before)


def test_a_model_within_another_and_one_with_adapters_have_their_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "wan.toml")
    model = tiny_wan()

    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(model, backend="liteattention", options={"threshold": path, "inner": "eager"})

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    denoise(Around(), noise(0), [prompt(0)], 2)  # raises if it does not fit

    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = base
            self.lora_A = torch.nn.Linear(base.in_features, 2)  # type: ignore[arg-type]

    expected = fingerprint(model)
    model.blocks[0].attn1.to_q = Adapted(model.blocks[0].attn1.to_q)
    assert fingerprint(model) == expected


def test_thresholds_of_another_criterion_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "wan.toml")
    message = "it was made under criterion='max', this model has 'mass'"
    with pytest.raises(OptionValueError, match=message):
        denoise(compiled(tiny_wan(), threshold=path, criterion="mass"), noise(0), [prompt(0)], 2)
    model = tiny_wan()
    run = compiled(model, criterion="mass")
    lite_compile.set_threshold(model, path)  # nothing is known of the model yet
    with pytest.raises(OptionValueError, match=message):
        denoise(run, noise(0), [prompt(0)], 2)
    model = tiny_wan()
    run = compiled(model, criterion="mass")
    denoise(run, noise(0), [prompt(0)], 2)
    with pytest.raises(OptionValueError, match=message):
        lite_compile.set_threshold(model, path)
