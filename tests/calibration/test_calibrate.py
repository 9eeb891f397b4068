"""Calibration of tiny models: what it promises is checked by independent replays of what it found."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import compiled, denoise, noise, prompt, run_pipeline, tiny_pipeline, tiny_wan
from test_regional import compile_blocks, compile_whole

import lite_compile
from lite_compile import Schedule, ops
from lite_compile.calibration import search
from lite_compile.calibration.attention_error import attention_error
from lite_compile.calibration.budget import Budget, default_share
from lite_compile.calibration.intercept import AttendCall
from lite_compile.calibration.points import interpolate, strictest
from lite_compile.calibration.replay import Replay, mean_density
from lite_compile.kernels.attend_cpu import attend_cpu
from lite_compile.skip_state import TileShape, state_shape

STEPS = 5
Run = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def make_run(model: Callable[..., Any], steps: int = STEPS) -> Run:
    """Two guidance streams; a number stands for a prompt and its seed."""
    return lambda number: denoise(model, noise(number), [prompt(number), prompt(99)], steps)


def replayed_errors(model: nn.Module, run: Run, number: int, metric: str = "l1") -> dict[tuple[str, int], float]:
    """Errors of a generation under what the model is set to, by layer and step; dense is PyTorch's own, in float64."""
    errors: dict[tuple[str, int], float] = {}
    names = ["blocks.0.attn1", "blocks.1.attn1"]
    count = [0]

    def intercept(kernel: ops.Kernel) -> ops.Kernel:
        def compute(*args: Any) -> None:
            q, k, v, _, now, scale, *_ = args
            kernel(*args)
            out = args[8].double()
            dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
            if metric == "l1":
                error = (out - dense).abs().sum() / dense.abs().sum()
            elif metric == "rmse":
                error = (out - dense).norm() / dense.norm()
            else:
                error = 1 - torch.nn.functional.cosine_similarity(out.flatten(), dense.flatten(), 0)
            key = (names[count[0] % 2], int(now[ops.NOW_STEP]))
            count[0] += 1
            errors[key] = max(errors.get(key, 0.0), float(error))

        return compute

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "intercept", intercept)
        run(number)
    return errors


@pytest.mark.parametrize("metric", ["l1", "rmse", "cosine"])
def test_the_budget_is_kept_when_the_model_follows_the_thresholds(metric: str) -> None:
    model = tiny_wan()
    run = make_run(compiled(model))
    target = 0.01 if metric != "cosine" else 5e-6
    found = lite_compile.calibrate(model, run, target, metric, prompts=[0, 1])
    assert found.met == 1
    assert found.density < 0.97
    lite_compile.set_threshold(model, found.thresholds)
    worst: dict[tuple[str, int], float] = {}
    for number in (0, 1):
        for key, error in replayed_errors(model, run, number, metric).items():
            worst[key] = max(worst.get(key, 0.0), error)
    budget = Budget(target, metric, steps=tuple(step / STEPS for step in range(STEPS)))
    for (layer, step), error in worst.items():
        assert error <= budget.at(step / STEPS) + 1e-6, (layer, step)
        # What was reported is what an independent computation finds.
        reported = next(e for f, e in found.errors[layer].items() if f == pytest.approx(step / STEPS, abs=1e-5))
        assert reported == pytest.approx(error, rel=0.02, abs=1e-5)  # float32 rounds by 3e-6
    # And the budget is used, as far as the few tiles allow; the cosine is quadratic in the difference.
    assert max(worst.values()) > (0.2 if metric != "cosine" else 0.2**2) * target


@pytest.mark.parametrize("metric", ["l1", "rmse", "cosine"])
def test_errors_of_a_model_as_it_is(metric: str) -> None:
    model = tiny_wan()
    run = make_run(compiled(model, threshold=-4.0))
    lite_compile.set_threshold(model, -2.0)
    expected, seen = run(0), list[Tensor]()
    errors = lite_compile.measure_errors(model, lambda number: seen.append(run(number)), metric, prompts=[0])
    assert torch.equal(seen[0], expected)  # measuring changes nothing
    assert (errors.metric, errors.source, errors.budget) == (metric, "measured in 1 generation", None)
    assert errors.fractions == pytest.approx([step / STEPS for step in range(STEPS)], abs=1e-5)
    for (layer, step), error in replayed_errors(model, run, 0, metric).items():
        found = dict(errors.layers)[layer][step]
        assert found == pytest.approx(error, rel=0.02, abs=1e-5 if metric != "cosine" else 1e-9)
    assert max(e for e in errors.worst if e is not None) > 1e-6
    with pytest.raises(ValueError, match="metric is 'rms'"):
        lite_compile.measure_errors(model, run, "rms", prompts=[0])
    with pytest.raises(RuntimeError, match="no attention of"):
        lite_compile.measure_errors(model, lambda: None)


def test_a_larger_budget_skips_more() -> None:
    model = tiny_wan()
    run = make_run(compiled(model))
    found = [lite_compile.calibrate(model, run, target, prompts=[0]).density for target in (0.0005, 0.003, 0.02)]
    assert found[0] > found[1] > found[2]


def counted(call: Callable[..., Tensor]) -> tuple[Callable[[int], Tensor], list[int], list[int]]:
    """A run, how often kernels computed attention in it, without our own counters, and how often it ran."""
    computed, asked = [0], [0]

    def counting(*args: Any, **named: Any) -> None:
        computed[0] += 1
        attend_cpu(*args, **named)

    def run(number: int) -> Tensor:
        asked[0] += 1
        taken, ops.intercept = ops.intercept, None
        assert taken is not None
        ops.intercept = lambda kernel: taken(counting)
        return make_run(call)(number)

    make_run(call)(0)
    return run, computed, asked


@pytest.mark.parametrize("prompts", [[0], [0, 1]])
def test_it_costs_less_than_ten_dense_generations(prompts: list[int]) -> None:
    model = tiny_wan()
    run, computed, asked = counted(compiled(model))
    found = lite_compile.calibrate(model, run, 0.02, prompts=prompts)
    assert found.met == 1
    assert asked[0] == 1 + 2 * len(prompts)  # a look at the steps, one search and one replay each, no repair
    attentions = computed[0] / (2 * 2 * STEPS * len(prompts))  # two layers, two streams
    assert found.cost == pytest.approx(attentions)
    assert attentions < 9


def test_the_cost_of_a_target_for_whole_generations() -> None:
    model = tiny_wan(layers=1)
    run, computed, asked = counted(compiled(model, dense_steps=(2, 0)))
    prompts = [0, 1, 2]
    found = lite_compile.calibrate(model, run, prompts=prompts, target_psnr=80)
    assert asked[0] > 2 + 3 * len(prompts)
    assert found.cost == pytest.approx(computed[0] / (2 * STEPS * len(prompts)))


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_nothing_is_compiled_anew_and_nothing_is_left_behind(compile_model: Any) -> None:
    model = tiny_wan()
    run = make_run(compile_model(model))
    lite_compile.set_threshold(model, -3.0)
    before = run(0), lite_compile.stats(model).density
    graphs = counters["stats"]["unique_graphs"]
    found = lite_compile.calibrate(model, run, 0.02, prompts=[0])
    assert {layer for layer, _ in found.thresholds.layers} == {"blocks.0.attn1", "blocks.1.attn1"}
    assert ops.intercept is None
    after = run(0), lite_compile.stats(model).density
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1] < 1
    lite_compile.set_threshold(model, found.thresholds)
    run(0)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompiles"]


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = tiny_wan()
    run = make_run(compiled(model))
    expected = run(0)

    def fail(number: int) -> None:
        denoise(compiled_model, noise(number), [prompt(number)], STEPS, stop_after=3)
        raise KeyError("the user's own")

    compiled_model = compiled(model)
    with pytest.raises(KeyError, match="the user's own"):
        lite_compile.calibrate(model, fail, prompts=[0])
    assert ops.intercept is None
    assert torch.equal(run(0), expected)


def test_a_run_without_prompts_through_a_pipeline_and_inductor() -> None:
    model = tiny_wan(layers=1)
    pipe = tiny_pipeline(compiled(model, inner="inductor"))
    found = lite_compile.calibrate(model, lambda: run_pipeline(pipe, 0, 4), 0.02)
    assert found.met == 1
    assert 0 < found.density < 1


def test_fifty_step_thresholds_serve_thirty_steps(tmp_path: Path) -> None:
    model = tiny_wan(layers=1)
    call = compiled(model)
    lite_compile.calibrate(model, make_run(call, 10), 0.02, out=tmp_path / "wan.toml", prompts=[0])
    lite_compile.set_threshold(model, str(tmp_path / "wan.toml"))
    errors = replayed_errors_of_one_layer(model, make_run(call, 6))
    assert lite_compile.stats(model).density < 0.95
    assert sum(error <= 0.02 * default_share(step / 5) for step, error in errors.items()) >= 5
    assert max(errors.values()) <= 0.03


def replayed_errors_of_one_layer(model: nn.Module, run: Run) -> dict[int, float]:
    """By step."""
    found: dict[int, float] = {}
    for (_, step), error in replayed_errors(model, run, 0).items():
        found[step] = max(found.get(step, 0.0), error)
    return found


@pytest.mark.parametrize("options", [{"criterion": "mass"}, {"refresh_every": 3}, {"must_skip": [(512, 640)]}])
def test_it_works_with_other_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_wan()
    run = make_run(compiled(model, **options))
    found = lite_compile.calibrate(model, run, 0.02, out=tmp_path / "wan.toml", prompts=[0])
    assert found.met == 1
    assert found.density < 1
    lite_compile.set_threshold(model, tmp_path / "wan.toml")
    run(0)
    assert lite_compile.load_calibration(tmp_path / "wan.toml").criterion == options.get("criterion", "max")


@pytest.mark.parametrize("options", [{"exclude_layers": ["blocks.0.*"]}, {"dense_layers": ["blocks.0.*"]}])
@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_layers_that_the_options_leave_out(compile_model: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """The file serves the model under the same options."""
    model = tiny_wan()
    run = make_run(compile_model(model, **options))
    found = lite_compile.calibrate(model, run, 0.02, out=tmp_path / "wan.toml", prompts=[0])
    assert set(found.errors) == {"blocks.1.attn1"}
    torch._dynamo.reset()
    again = tiny_wan()
    make_run(compile_model(again, threshold=tmp_path / "wan.toml", **options))(0)
    assert lite_compile.stats(again).density < 1


def test_a_layer_that_stays_dense_is_not_shifted_with_the_others() -> None:
    model = tiny_wan()
    run = make_run(compile_blocks(model, dense_layers=["blocks.0.*"]))
    found = lite_compile.calibrate(model, run, prompts=[0], target_psnr=80)
    assert found.quality is not None
    assert found.quality.scale != 1
    thresholds = {layer: set(schedule.thresholds) for layer, schedule in found.thresholds.layers}
    assert thresholds["blocks.0.attn1"] == {-math.inf}
    assert max(thresholds["blocks.1.attn1"]) > search.FLOOR


def test_the_share_can_be_replaced() -> None:
    model = tiny_wan()
    run = make_run(compiled(model))
    late = lite_compile.calibrate(model, run, 0.02, prompts=[0], share=lambda position: 1.0 if position > 0.9 else 1e-6)
    for steps in late.densities.values():
        assert all(density == 1 for fraction, density in steps.items() if fraction < 0.7)
    assert late.density < 1
    with pytest.raises(ValueError, match=r"share\(0\) is 1.5; allowed: a number above 0, at most 1"):
        lite_compile.calibrate(model, run, share=lambda position: 1.5, prompts=[0])


def test_it_goes_on_after_a_crash(tmp_path: Path) -> None:
    out = tmp_path / "wan.toml"
    model = tiny_wan()
    plain = make_run(compiled(model))
    expected = lite_compile.calibrate(model, plain, 0.02, prompts=[0, 1])
    calls: list[int] = []

    def crashing(number: int) -> Tensor:
        calls.append(number)
        if len(calls) == 4:
            raise OSError("power cut")
        return plain(number)

    with pytest.raises(OSError, match="power cut"):
        lite_compile.calibrate(model, crashing, 0.02, out=out, prompts=[0, 1])
    partial = tmp_path / "wan.toml.partial"
    assert len(json.loads(partial.read_text())["done"]) == 3
    assert not out.exists()
    calls[:] = [0] * 10
    found = lite_compile.calibrate(model, crashing, 0.02, out=out, prompts=[0, 1])
    assert len(calls) == 12, "the survey and the two searches were not done again, the replays were"
    assert found.thresholds == expected.thresholds
    assert found.errors == expected.errors
    assert not partial.exists()
    assert lite_compile.load_calibration(out).layers[0][0] == "blocks.0.attn1"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: '{"version": 0, "settings": {}, "done": {}}', "is damaged"),
        (lambda text: text.replace('"target_error": 0.02', '"target_error": 0.5'), r"other settings \(target_error\)"),
    ],
)
def test_a_partial_file_that_does_not_fit_is_told_and_not_trusted(
    tmp_path: Path, spoil: Callable[[str], str], message: str
) -> None:
    out, partial = tmp_path / "wan.toml", tmp_path / "wan.toml.partial"
    model = tiny_wan(layers=1)
    run = make_run(compiled(model), 3)
    done: list[int] = []

    def crash(number: int) -> None:
        done.append(number)
        if len(done) > 1:
            raise OSError("power cut")
        run(number)

    with pytest.raises(OSError, match="power cut"):
        lite_compile.calibrate(model, crash, 0.02, out=out, prompts=[0])
    partial.write_text(spoil(partial.read_text()))
    count = []
    with pytest.warns(UserWarning, match=message):
        lite_compile.calibrate(model, lambda n: count.append(n) or run(n), 0.02, out=out, prompts=[0])
    assert len(count) >= 2
    assert not partial.exists()


# Errors of use


def test_a_model_that_is_not_compiled_and_a_run_that_does_not_call_it() -> None:
    model = tiny_wan()
    for run in (make_run(model), lambda number: None):
        with pytest.raises(RuntimeError, match=r"no attention of WanTransformer3DModel ran .* during run\(\)"):
            lite_compile.calibrate(model, run, prompts=[0])
    denoise(compiled(model), noise(0), [prompt(0)], 2)
    with pytest.raises(RuntimeError, match="no attention of"):
        lite_compile.calibrate(model, lambda: None)


def test_cuda_graphs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed CUDA graph is a call of the model in which the op does not run: so is this one."""
    model = tiny_wan()
    run = make_run(compiled(model))
    run(0)

    def without_the_op(number: int) -> None:
        from lite_compile.layer_state import bindings

        bindings(model)[0].calls += 1

    with pytest.raises(RuntimeError, match="CUDA graphs"):
        lite_compile.calibrate(model, without_the_op, prompts=[0])


def test_one_step_is_too_few() -> None:
    model = tiny_wan()
    with pytest.raises(RuntimeError, match="no second step"):
        lite_compile.calibrate(model, make_run(compiled(model), 1), prompts=[0])


def test_one_calibration_at_a_time() -> None:
    model = tiny_wan()
    run = make_run(compiled(model))

    def nested(number: int) -> None:
        lite_compile.calibrate(model, run, prompts=[0])

    with pytest.raises(RuntimeError, match="another calibration is running"):
        lite_compile.calibrate(model, nested, prompts=[0])
    assert ops.intercept is None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"target_error": 0}, ValueError, "target_error is 0; allowed: a number above 0, at most 1"),
        ({"target_error": math.nan}, ValueError, "target_error is nan"),
        ({"target_error": "5 %"}, TypeError, r"target_error is '5 %' \(str\)"),
        ({"metric": "rms"}, ValueError, r"metric is 'rms'; allowed: 'l1', 'rmse', 'cosine'\. Did you mean 'rmse'"),
        ({"prompts": "a fox"}, TypeError, "prompts is 'a fox'"),
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"target_psnr": -3}, ValueError, "target_psnr is -3"),
        ({"target_ssim": 1.5}, ValueError, "target_ssim is 1.5"),
        ({"target_ssim": 0.9, "target_psnr": 30}, ValueError, "allowed: one of them"),
        ({"held_out": [1]}, ValueError, "held_out is for"),
        ({"value_range": (0, 1)}, ValueError, "value_range is for"),
        ({"target_psnr": 30, "value_range": (1, 0)}, ValueError, r"value_range is \(1, 0\)"),
        ({"target_psnr": 30, "value_range": (0, math.inf)}, ValueError, r"value_range is \(0, inf\)"),
        ({"out": "/nowhere/at/all.toml"}, ValueError, "a file in a folder that exists"),
        ({"run": 3}, TypeError, "run is 3"),
        ({"model": None}, TypeError, "model is None"),
        ({"model": 3}, TypeError, "model is 3"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": nn.Linear(2, 2), "run": lambda *_: None, "prompts": [0], **arguments}
    with pytest.raises(kind, match=message):
        lite_compile.calibrate(given.pop("model"), given.pop("run"), **given)


# Parts


def test_errors_are_those_of_the_worst_batch_entry() -> None:
    dense = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    sparse = dense.clone()
    sparse[1] *= 1.5
    assert attention_error(sparse, dense, "l1") == pytest.approx(0.5, rel=1e-5)
    assert attention_error(sparse, dense, "rmse") == pytest.approx(0.5, rel=1e-5)
    assert attention_error(sparse, dense, "cosine") == pytest.approx(0, abs=1e-6)
    sparse[0] = -dense[0]
    assert attention_error(sparse, dense, "cosine") == pytest.approx(2, rel=1e-5)
    near = dense + 1e-4 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    pairs = list(zip(near.double().flatten(1), dense.double().flatten(1), strict=True))
    exact = [1 - (x @ y / (x.norm() * y.norm())) for x, y in pairs]
    assert attention_error(near, dense, "cosine") == pytest.approx(float(max(exact)), rel=1e-3)  # 5e-9
    assert attention_error(torch.zeros_like(dense), dense, "cosine") == 1
    sparse[0, 0, 0, 0] = math.nan
    for metric in ("l1", "rmse", "cosine"):
        assert attention_error(sparse, dense, metric) == math.inf
        assert attention_error(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), metric) == 0
        assert attention_error(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), metric) == math.inf


def test_positions_are_those_of_the_steps() -> None:
    budget = Budget(1.0, "l1", steps=(0.0, 0.01, 0.1, 0.6))
    assert [budget.at(f) for f in (0.0, 0.01, 0.1, 0.6, 1.0)] == [default_share(i / 3) for i in (0, 1, 2, 3, 3)]
    assert budget.at(0.055) == pytest.approx(default_share(0.5))
    for steps in ((), (0.0,)):
        assert Budget(1.0, "l1", steps=steps).at(0.3) == default_share(0.3)


def test_heads_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(2, 2, 5, 50, 8, generator=torch.Generator().manual_seed(0))
    whole = attention_error(a, b, "rmse")
    monkeypatch.setattr("lite_compile.calibration.attention_error._ELEMENTS_AT_ONCE", 1)
    assert attention_error(a, b, "rmse") == pytest.approx(whole, rel=1e-5)


def test_the_strictest_of_several_generations() -> None:
    a = {"x": {0.0: -10.0, 0.5: -4.0, 0.8: -2.0}, "y": {0.0: -1.0}}
    b = {"x": {0.0: -6.0, 0.4: -8.0}}
    assert strictest([a, b]) == {"x": {0.0: -10.0, 0.4: -8.0, 0.5: -8.0, 0.8: -8.0}, "y": {0.0: -1.0}}
    assert interpolate({0.0: -8.0, 0.5: -4.0}, 0.25) == -6.0
    assert mean_density({}) == 1.0


STREAM_STEPS = 6


def attend_two_streams(handle: Callable[[str, AttendCall], None], step: int, state: Tensor) -> float:
    """One step of a layer whose second stream attends more broadly than the first; the density of the first."""
    densities = []
    for slot, sharpness in enumerate((3.0, 1.0)):
        generator = torch.Generator().manual_seed(slot)
        q, k, v = torch.randn(3, 1, 2, 512, 16, generator=generator)
        angle = torch.linspace(-1, 1, 512)[:, None] * sharpness
        place = 6 * torch.cat([angle.cos(), angle.sin()], -1).expand(1, 2, 512, 2)
        q, k = (torch.cat([x[..., 2:] + 0.02 * step, place], -1) for x in (q, k))
        fraction = step / STREAM_STEPS
        (bits,) = struct.unpack("i", struct.pack("f", fraction))
        now = torch.tensor([1 + slot, step, slot, 1, bits], dtype=torch.int32)
        call = AttendCall(
            attend_cpu, (q, k, v), state, now, 0.25, torch.tensor([-1.0]), TileShape(32, 32), torch.empty_like(q),
            None, (), {}, 1 + slot, slot, fraction,
        )  # fmt: skip
        handle("x", call)
        densities.append(call.density())
    return densities[0]


def test_a_stream_that_went_too_far_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end the first stream, which alone could be bolder, has the masks that a replay of the thresholds makes."""

    def last_density(handle: Callable[[str, AttendCall], None]) -> float:
        state = torch.zeros(state_shape(2, 1, 2, 512, 512, TileShape(32, 32)), dtype=torch.int32)
        return [attend_two_streams(handle, step, state) for step in range(STREAM_STEPS)][-1]

    def found_and_replayed() -> tuple[float, float]:
        # A budget that hardly grows at the end: what the second stream finds in the last step, the first is not told.
        finder = search.ThresholdSearch(Budget(0.02, "l1", lambda position: 0.25 + 0.75 * math.sqrt(position)), 1.0)
        found = last_density(finder)
        points = finder.found["x"]
        return found, last_density(Replay(Schedule.points({**points, 1: points[max(points)]})))

    found, replayed = found_and_replayed()
    assert abs(found - replayed) < 0.01
    monkeypatch.setattr(search.ThresholdSearch, "_go_back", lambda *_: None)
    found, replayed = found_and_replayed()
    assert found < replayed - 0.03
