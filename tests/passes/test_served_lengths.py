"""What stays dense because it is short does not serve, under dynamic shapes, sequences that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graphs import DIM, Denoiser, capture, inputs
from torch import Tensor, fx, nn

from lite_compile import Options, Reason
from lite_compile.passes import find_launch_bound as module
from lite_compile.passes.attention_site import AttentionSite
from lite_compile.passes.decide_attention import Decline, decide_attention
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_launch_bound import LaunchBound, find_launch_bound, list_products, total_flops
from lite_compile.passes.graph_inputs import fake_tensor, size_hint
from lite_compile.passes.served_sizes import serve_only

LONG = 600
"""Tokens from which on neither rule says anything here."""
LENGTHS = (128, 256, 512, 700, 1024, 128, 800)


def length_of(site: AttentionSite) -> int:
    query = fake_tensor(site.q)
    assert query is not None
    length = size_hint(query.shape[2])
    assert length is not None
    return length


@pytest.fixture(params=["min_seq_len", "launches"])
def stays_dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[fx.GraphModule], bool]:
    """Whether one of the two rules leaves the attention of a graph dense."""
    if request.param == "min_seq_len":
        return lambda gm: reason_for(gm, None, min_seq_len=LONG) is Reason.SHORT

    let_launching_take_as_long_as(Denoiser(), inputs(tokens=LONG), monkeypatch)

    def is_launch_bound(gm: fx.GraphModule) -> bool:
        bound = find_launch_bound(gm, find_attention(gm), Options())
        return reason_for(gm, bound, min_seq_len=16) is Reason.LAUNCHES

    return is_launch_bound


def let_launching_take_as_long_as(
    model: nn.Module, arguments: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launching takes the host as long as a GPU of one operation per second takes for these arguments."""
    gm = capture(model, *arguments)
    flops = total_flops(list_products(gm.graph, find_attention(gm)))
    monkeypatch.setattr(module, "_has_known_speed", lambda x: True)
    monkeypatch.setattr(module, "host_seconds", lambda *_: flops)
    monkeypatch.setattr(module, "gpu_seconds", lambda flops, _: flops)


def reason_for(gm: fx.GraphModule, launch_bound: LaunchBound | None, **options: Any) -> Reason | None:
    (decision,) = decide_attention(find_attention(gm), None, Options(**options), (), launch_bound)
    return decision.reason if isinstance(decision, Decline) else None


def compilations(
    stays_dense: Callable[[fx.GraphModule], bool],
    lengths: Sequence[int],
    mark: Callable[[Tensor], None] = lambda hidden: None,
    **kwargs: Any,
) -> list[tuple[int, bool]]:
    """For which of these lengths, run one after the other, something is compiled, and whether that stays dense."""
    compiled: list[tuple[int, bool]] = []

    def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled.append((length_of(find_attention(gm)[0]), stays_dense(gm)))
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(Denoiser(), backend=compiler, fullgraph=True, **kwargs)
    for length in lengths:
        hidden, *rest = inputs(tokens=length)
        mark(hidden)
        with torch.no_grad():
            run(hidden, *rest)
    return compiled


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [(True, [(128, True), (700, False)]), (None, [(128, True), (256, True), (700, False)])],
)
def test_long_sequences_are_compiled_once_more(
    stays_dense: Callable[[fx.GraphModule], bool], dynamic: bool | None, expected: list[tuple[int, bool]]
) -> None:
    assert compilations(stays_dense, LENGTHS, dynamic=dynamic) == expected


def test_a_mark_of_the_user_is_no_obstacle(stays_dense: Callable[[fx.GraphModule], bool]) -> None:
    def mark(hidden: Tensor) -> None:
        torch._dynamo.mark_dynamic(hidden, 1)

    assert compilations(stays_dense, LENGTHS, mark) == [(128, True), (700, False)]


def test_a_promised_range_of_sizes_is_left_whole(stays_dense: Callable[[fx.GraphModule], bool]) -> None:
    """Torch would refuse to compile for less of it."""

    def mark(hidden: Tensor) -> None:
        torch._dynamo.mark_dynamic(hidden, 1, min=64, max=4096)

    assert compilations(stays_dense, LENGTHS, mark) == [(128, True)]


@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.maybe_mark_dynamic])
def test_one_length_alone_is_not_made_a_constant(
    mark: Callable[[Tensor, int], None], stays_dense: Callable[[fx.GraphModule], bool]
) -> None:
    """Two frames are the fewest that torch takes for dynamic; that alone would be below the limit."""

    class Frames(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return super().forward(hidden_states.flatten(1, 2), timestep, prompt)

    compiled: list[int] = []

    def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled.append(length_of(find_attention(gm)[0]))
        stays_dense(gm)
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(Frames(), backend=compiler, fullgraph=True)
    for frames in (2, 3, 5, 2):
        hidden, *rest = inputs(tokens=frames * LONG // 3)
        hidden = hidden.unflatten(1, (frames, -1))
        mark(hidden, 1)
        with torch.no_grad():
            run(hidden, *rest)
    assert compiled[0] == 2 * LONG // 3
    assert len(compiled) <= 2


def test_a_hint_that_is_not_the_size_is_no_obstacle(stays_dense: Callable[[fx.GraphModule], bool]) -> None:
    def mark(hidden: Tensor) -> None:
        torch._dynamo.mark_dynamic(hidden, 1, hint_override=128)

    assert compilations(stays_dense, [700, 800], mark) == [(128, True)]


def test_a_batch_grows_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    let_launching_take_as_long_as(Denoiser(), inputs(batch=10, tokens=256), monkeypatch)

    def mark(hidden: Tensor) -> None:
        torch._dynamo.mark_dynamic(hidden, 0)

    gm = capture(Denoiser(), *inputs(batch=3, tokens=256), mark=mark)
    found = find_launch_bound(gm, find_attention(gm), Options())
    assert found is not None
    assert found.below is not None
    assert found.below.limit == pytest.approx(10 * 256, abs=1)


class Reader(Denoiser):
    """Most of what it does to short sequences is to project its text."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(DIM, 4096)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, prompt) + self.read(prompt).mean()


def test_work_that_does_not_grow_with_the_sequence_costs_no_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bool] = []

    def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found = find_launch_bound(gm, find_attention(gm), Options())
        compiled.append(found is not None)
        if found is not None:
            assert found.below is not None
            serve_only(found.below)
        return gm.forward

    model, text = Reader(), torch.ones(1, 1024, DIM)
    let_launching_take_as_long_as(model, [*inputs(tokens=2048)[:2], text], monkeypatch)
    torch._dynamo.reset()
    run = torch.compile(model, backend=compiler, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (64, 128, 256, 512, 1024, 1500, 2000, 2500, 5000, 20000, 64):
            run(*inputs(tokens=length)[:2], text)
    assert compiled.count(True) == 1
    assert compiled[-1] is False
