"""The clock outside of graphs, compiled: it decides what the clock that runs operator by operator decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from models import DEVICE, OPTIONS, denoise, noise, prompt, tiny_wan
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager

from lite_compile import advance_clock, runtime
from lite_compile.advance_clock import MAX_COMPILED, ClockAdvance, ClockRules
from lite_compile.clock import clock_words
from lite_compile.layer_state import layer_states
from lite_compile.ops import NOW_GENERATION, NOW_SLOT, NOW_STEP
from lite_compile.trajectory import DenseSteps

Call = tuple[list[Tensor], Tensor | float, list[Tensor | float]]
STREAMS, CONDITIONS = 3, 3


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What is compiled, by `aot_eager`: Inductor would write C++ here."""
    seen: list[fx.GraphModule] = []

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        compiled: Callable[..., Any] = aot_eager(graph, list(inputs))
        return compiled

    monkeypatch.setattr(advance_clock, "compile_graph", compile_graph)
    return seen


def rules(compiled: bool, **options: Any) -> ClockRules:
    return ClockRules(STREAMS, DEVICE, compiled=compiled, **options)


def new_clock() -> Tensor:
    return torch.zeros(clock_words(STREAMS, CONDITIONS), dtype=torch.int32, device=DEVICE)


def calls(length: int = 16) -> Iterator[Call]:
    """Two generations of five steps with two prompts each, one of them with a number for a timestep."""
    texts = [torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (length, length + 1)]
    for seed in (0, 1):
        start, drift = (noise(10 * seed + i) for i in (2, 3))
        for step in range(5):
            latents = [start + 0.05 * step * drift]
            for text in texts:
                time = 1000.0 - 100 * step
                yield latents, time if seed else torch.tensor([time], device=DEVICE), [text, 7.5, True]


def run(advance: ClockAdvance, given: Iterator[Call]) -> tuple[Tensor, Tensor]:
    """What each call was told, and the clock at the end."""
    clock = new_clock()
    with torch.no_grad():
        told = [advance(clock, *call).clone() for call in given]
    return torch.stack(told), clock


@pytest.mark.parametrize("options", [{}, {"dense_steps": DenseSteps(1, 0.2)}, {"refresh_every": 2}], ids=str)
def test_compiled_and_eager_decide_alike(compilations: list[fx.GraphModule], options: dict[str, Any]) -> None:
    expected, _ = run(ClockAdvance(rules(False, **options)), calls())
    told, _ = run(ClockAdvance(rules(True, **options)), calls())
    assert torch.equal(told, expected)
    assert expected[:, NOW_GENERATION].tolist() == [1] * 10 + [2] * 10
    assert expected[:, NOW_STEP].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] * 2
    # Per length of the text one graph; a number for a timestep becomes such a tensor as the other was.
    assert len(compilations) == 2


def test_what_cannot_be_compiled_runs_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0

    def fail(*_: Any) -> Any:
        nonlocal tried
        tried += 1
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(advance_clock, "compile_graph", fail)
    with pytest.warns(UserWarning, match="no compiler here"):
        told, _ = run(ClockAdvance(rules(True)), (call for i, call in enumerate(calls()) if i % 2))
    assert tried == 1
    assert told[:, NOW_STEP].tolist() == [0, 1, 2, 3, 4] * 2
    assert told[:, NOW_GENERATION].tolist() == [1] * 5 + [2] * 5
    assert bool((told[:, NOW_SLOT] >= 0).all())


def test_a_compiled_clock_that_fails_half_way_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = ClockAdvance(rules(True))
    clock = new_clock()
    for latents, timestep, conditions in list(calls())[:3]:
        ClockAdvance(rules(False))(clock, latents, timestep, conditions)
    before = int(clock[0])

    def compile_graph(*_: Any) -> Callable[..., Any]:
        def half_way(clock: Tensor, *_: Tensor) -> Any:
            clock[100:200] = 5
            raise RuntimeError("half way")

        return half_way

    monkeypatch.setattr(advance_clock, "compile_graph", compile_graph)
    with pytest.warns(UserWarning, match="half way"):
        now = advance(clock, *list(calls())[4])
    assert int(now[NOW_GENERATION]) == before + 1
    assert int(now[NOW_STEP]) == 0


def test_few_signatures_are_compiled(compilations: list[fx.GraphModule]) -> None:
    """A prompt is known again whether its length was among the first or not."""
    advance = ClockAdvance(rules(True))
    for length in range(10, 10 + 2 * MAX_COMPILED, 2):
        told, _ = run(advance, calls(length))
        assert told[:, NOW_STEP].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] * 2
        assert told[:, NOW_SLOT].tolist() == [0, 1] * 10
    assert len(compilations) == MAX_COMPILED


VALUES = torch.randn(1, 5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
CONJUGATED = VALUES.conj()


@pytest.mark.parametrize(
    ("first", "view"), [(VALUES, CONJUGATED), (-CONJUGATED.imag, CONJUGATED.imag)], ids=["conj", "neg"]
)
def test_conditions_that_are_to_be_negated_when_read(
    compilations: list[fx.GraphModule], first: Tensor, view: Tensor
) -> None:
    """Compiled code that was made for a plain tensor, and is given one whose memory holds something else."""
    assert view.is_conj() or view.is_neg()
    given = [([noise(0) * (1 - 0.1 * i)], 900.0 - i, [x, 0, 0]) for i, x in enumerate((first, view, view.clone()))]
    expected, _ = run(ClockAdvance(rules(False)), iter(given))
    told, _ = run(ClockAdvance(rules(True)), iter(given))
    assert torch.equal(told, expected)
    assert expected[:, NOW_SLOT].tolist() == [0, 1, 1]
    assert len(compilations) == 1


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_blocks_that_compile_the_clock_while_they_run(
    compilations: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch, inference: bool
) -> None:
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(runtime, "ClockRules", lambda *given, on=compiled: ClockRules(*given[:4], on))
        model = tiny_wan(layers=2)
        model.compile_repeated_blocks(backend="liteattention", fullgraph=True, options=OPTIONS)
        with torch.inference_mode(inference):
            videos = [denoise(model, noise(seed), [prompt(0), prompt(1)], 4) for seed in (0, 1)]
        runs.append((videos, [state.state.clone() for state in layer_states(model)]))
    assert len(compilations) == 1
    (videos, states), (compiled_videos, compiled_states) = runs
    assert all(map(torch.equal, videos, compiled_videos))
    assert all(map(torch.equal, states, compiled_states))
    assert any(bool(state.any()) for state in states)
