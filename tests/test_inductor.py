"""Through Inductor: one compilation, persistent state, and generated code without copies of the state."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEVICE, OPTIONS, TOLERANCE, denoise, noise, prompt, tiny_wan
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import lite_compile

INDUCTOR: dict[str, Any] = {**OPTIONS, "inner": "inductor"}


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_state_is_neither_cloned_nor_copied_and_nothing_synchronises() -> None:
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", fullgraph=True, options=INDUCTOR)
    arguments = {
        "hidden_states": noise(0),
        "timestep": torch.tensor([1000.0], device=DEVICE),
        "encoder_hidden_states": prompt(0),
    }
    with torch.no_grad():
        _, codes = run_and_get_code(run, **arguments)
    code = "\n".join(codes)
    calls = re.findall(r"torch\.ops\.lite_compile\.attend\.default\((.*)\)", code)
    assert len(calls) == 2
    thresholds: set[str] = set()
    for call in calls:
        # state, now, scale, threshold, tile
        found = re.search(r"(\w+), \w+, [\d.]+, reinterpret_tensor\((\w+), \(\), \(\), \d\), \d+, \d+", call)
        assert found, call
        assert re.fullmatch(r"arg\d+_1", found[1]), f"the state is {found[1]}, not an input of the graph"
        assert re.fullmatch(r"buf\d+", found[2])
        thresholds.add(found[2])
    assert not re.search(r"empty_strided\w*\(\(4, 1, 2,[^)]*\), \([^)]*\), torch\.int32\)", code)
    assert len(thresholds) == 1  # computed once for all layers
    assert ".item()" not in code
    assert "synchronize" not in code


def test_masks_persist_across_compiled_calls() -> None:
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", fullgraph=True, options=INDUCTOR)
    densities = []
    for number in (0, 1):
        result = denoise(run, noise(number), [prompt(number), prompt(9)], 6)
        densities.append(lite_compile.stats(model).density)
        plain = denoise(tiny_wan(), noise(number), [prompt(number), prompt(9)], 6)
        assert (result - plain).norm() < TOLERANCE * plain.norm()
    assert max(densities) < 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert {s.generations for s in lite_compile.stats(model).streams} == {2}


def test_dynamic_shapes() -> None:
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", fullgraph=True, dynamic=True, options=INDUCTOR)
    for number, height in enumerate((32, 48, 40)):
        latents = noise(number, (1, 4, 4, height, 32))
        plain = denoise(tiny_wan(), latents, [prompt(number)], 4)
        result = denoise(run, latents, [prompt(number)], 4)
        assert (result - plain).norm() < TOLERANCE * plain.norm()
    assert counters["stats"]["unique_graphs"] <= 2  # torch specialises equal height and width once


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}),
        ({"options": {"mode": "reduce-overhead"}}, {"triton.cudagraphs": True}),
        ({"options": {"inductor": {"epilogue_fusion": False}}}, {"epilogue_fusion": False}),
        ({"options": {"mode": "max-autotune", "inductor": {"max_autotune": False}}}, {"max_autotune": False}),
    ],
)
def test_mode_and_inductor_options_reach_inductor(
    arguments: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def compile_fx(gm: Any, example_inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4), backend="liteattention", **arguments)(torch.ones(1, 4))
    assert expected.items() <= seen.items()


def test_nothing_skipped_is_as_exact_as_dense_attention() -> None:
    """threshold=-inf through the compiled model, against float64; the dense model in the same dtype is the measure."""
    arguments = {
        "hidden_states": noise(0),
        "timestep": torch.tensor([700.0], device=DEVICE),
        "encoder_hidden_states": prompt(0),
        "return_dict": False,
    }
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", options={**OPTIONS, "threshold": -float("inf")})
    with torch.no_grad():
        for _ in range(3):
            ours = run(**arguments)[0].double()
        dense = model(**arguments)[0].double()
        double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        exact = tiny_wan().double()(**double)[0]
    assert lite_compile.stats(model).density == 1.0
    assert (ours - exact).norm() <= 2 * (dense - exact).norm()


def test_the_backend_is_found_without_importing_the_package(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "assert 'lite_compile' not in sys.modules\n"
        "model = torch.compile(torch.nn.Linear(2, 2), backend='liteattention', options={'inner': 'eager'})\n"
        "assert 'lite_compile' in sys.modules\n"
        "with torch.no_grad(): print(model(torch.ones(1, 2)).shape)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 2])" in result.stdout


def test_importing_the_package_does_not_import_triton_kernels(tmp_path: Path) -> None:
    script = "import sys, lite_compile; assert not any('attend_triton' in m for m in sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    entry_points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert "liteattention" in {entry.name for entry in entry_points}
