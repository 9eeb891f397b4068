"""The backend on a real GPU: Inductor, CUDA graphs, persistence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_kernels import KERNELS
from models import OPTIONS, TOLERANCE, denoise, noise, prompt, tiny_wan
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import lite_compile
from lite_compile import OptionValueError
from lite_compile.layer_state import layer_states

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def options(**more: Any) -> dict[str, Any]:
    return {**OPTIONS, "inner": "inductor", **more}


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_that_is_asked_for_is_used(kernel: str) -> None:
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", options=options(kernel=kernel))
    results = [denoise(run, noise(seed), [prompt(seed), prompt(9)], 6) for seed in (0, 1)]
    kernels = {site.kernel for site in lite_compile.report().graphs[-1].sites if site.rewritten}
    assert kernels == {kernel}
    assert lite_compile.stats(model).density < 1
    for seed, result in enumerate(results):
        plain = denoise(tiny_wan(), noise(seed), [prompt(seed), prompt(9)], 6)
        assert (result - plain).norm() < TOLERANCE * plain.norm()


def test_a_kernel_that_cannot_be_used_is_an_error() -> None:
    run = torch.compile(tiny_wan(), backend="liteattention", options=options(kernel="cpu"))
    with pytest.raises(OptionValueError, match=r"'kernel' is 'cpu'.*attn1.*'triton', 'hopper'"):
        denoise(run, noise(0), [prompt(0)], 2)


CONTROL: dict[str, Any] = {"refresh_every": 3, "must_compute": [(0, 50)], "must_skip": [(-300, None)], "probe": True}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("more", [{}, CONTROL], ids=["", "control"])
def test_cuda_graphs_are_captured_and_the_state_persists(kernel: str, more: dict[str, Any]) -> None:
    """One CUDA-graph launch per call, and the same numbers and masks as without CUDA graphs.

    Inductor tries several configurations of a reduction and takes the fastest, so that two compilations may round
    differently; "deterministic" makes it take the same.
    """
    results, masks = [], []
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_wan()
        given = options(mode=mode, kernel=kernel, inductor={"deterministic": True}, **more)
        run = torch.compile(model, backend="liteattention", options=given)

        def call(**kwargs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return tuple(x.clone() for x in run(**kwargs))  # noqa: B023

        generations = [denoise(call, noise(number), [prompt(number), prompt(9)], 8) for number in (0, 1)]
        results.append(generations)
        states = sorted(layer_states(model), key=lambda s: s.layer)
        masks.append([s.state.clone() for s in states])
        assert lite_compile.stats(model).density < 1
        assert {s.generations for s in lite_compile.stats(model).streams} == {2}
        if mode == "reduce-overhead":
            assert counters["inductor"]["cudagraph_skips"] == 0
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
                denoise(call, noise(2), [prompt(2)], 4)
            launches = sum(e.count for e in trace.key_averages() if "cudaGraphLaunch" in e.key)
            assert launches == 4
    for plain, captured in zip(*results, strict=True):
        assert torch.equal(plain, captured)
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_cuda_graphs_of_two_models_that_take_turns() -> None:
    """What the kernels keep between calls, of one model's graphs, is not written by the other's."""

    def generations(mode: str) -> list[torch.Tensor]:
        torch._dynamo.reset()
        models = tiny_wan(), tiny_wan()
        given = options(mode=mode, inductor={"deterministic": True})
        runs = [torch.compile(model, backend="liteattention", options=given) for model in models]
        latents = [noise(0), noise(1)]
        for step in range(8):
            for number, run in enumerate(runs):
                torch.compiler.cudagraph_mark_step_begin()
                time = torch.tensor([1000.0 - 100 * step], device=latents[number].device)
                with torch.no_grad():
                    found = run(hidden_states=latents[number], encoder_hidden_states=prompt(number), timestep=time)
                latents[number] = latents[number] - 0.1 * found[0].clone()
        assert all(lite_compile.stats(model).density < 1 for model in models)
        return latents

    for plain, captured in zip(generations("default"), generations("reduce-overhead"), strict=True):
        assert torch.equal(plain, captured)


@pytest.mark.parametrize(
    "given",
    [{}, {"history": True}, {"threshold": lite_compile.Schedule.linear(-12, -3), "dense_steps": (1, 1)}, CONTROL],
    ids=["", "history", "schedule", "control"],
)
def test_no_host_synchronisation_in_a_step(given: dict[str, Any]) -> None:
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", options=options(**given))
    arguments = {"hidden_states": noise(0), "encoder_hidden_states": prompt(0)}
    times = [torch.tensor([t], device="cuda") for t in (1000.0, 900.0, 800.0)]
    with torch.no_grad():
        run(timestep=times[0], **arguments)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in times[1:]:
                run(timestep=t, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_both_half_precisions(dtype: torch.dtype) -> None:
    model, dense = tiny_wan().to(dtype), tiny_wan().to(dtype)
    run = torch.compile(model, backend="liteattention", options=options())
    arguments = noise(0).to(dtype), [prompt(0).to(dtype)], 6
    expected = denoise(dense, *arguments)
    result = denoise(run, *arguments)
    assert lite_compile.stats(model).density < 1
    assert (result - expected).norm() < 5e-2 * expected.norm()


def test_memory_of_the_state_is_what_the_report_says() -> None:
    model = tiny_wan()
    denoise(torch.compile(model, backend="liteattention", options=options()), noise(0), [prompt(0)], 2)
    states = layer_states(model)
    assert {s.state_bytes for s in lite_compile.stats(model).streams} == {states[0].state.nbytes}
    assert states[0].state.device.type == "cuda"


@pytest.mark.parametrize("kernel", KERNELS)
def test_refreshes_and_ranges_hold_in_cuda_graphs_and_may_be_changed(kernel: str) -> None:
    """What nothing attends to has no influence, and every third step is computed in full but for that."""
    model = tiny_wan()
    given = options(mode="reduce-overhead", kernel=kernel, history=True, threshold=-1.0, **CONTROL)
    run = torch.compile(model, backend="liteattention", options=given)

    def call(**kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(x.clone() for x in run(**kwargs))

    graphs = None
    for ranges in (CONTROL["must_skip"], [(-128, None)], []):
        lite_compile.set_ranges(model, must_skip=ranges)
        denoise(call, noise(0), [prompt(0)], 7)
        (stream,) = (s for s in lite_compile.stats(model).streams if s.layer == "blocks.0.attn1")
        full = stream.history[0]
        assert full is not None
        assert (full == 1) == (ranges == [])
        assert [density == full for density in stream.history] == [step % 3 == 0 for step in range(7)]
        graphs = graphs or counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs
        exact = torch.compile(
            tiny_wan(),
            backend="liteattention",
            options=options(must_skip=ranges, threshold=-float("inf"), kernel=kernel),
        )
        expected = denoise(exact, noise(0), [prompt(0)], 1)
        assert (denoise(call, noise(0), [prompt(0)], 1) - expected).norm() < TOLERANCE * expected.norm()
        graphs = counters["stats"]["unique_graphs"]


def test_history_under_cuda_graphs() -> None:
    """The entries that replays write are what `stats()` gives after each step."""
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", options=options(mode="reduce-overhead", history=True))
    for number in (0, 1):
        seen: list[float] = []

        def call(**kwargs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            result = tuple(x.clone() for x in run(**kwargs))
            seen.append(lite_compile.stats(model).streams[0].density)  # noqa: B023
            return result

        denoise(call, noise(number), [prompt(number)], 8)
        (history,) = {s.history for s in lite_compile.stats(model).streams if s.layer == "blocks.0.attn1"}
        assert list(history) == seen
        assert history[-1] < 1
