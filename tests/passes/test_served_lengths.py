"""What stays dense because it is short does not serve, under dynamic shapes, sequences that are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graphs import Denoiser, decide, inputs
from torch import Tensor, fx

from lite_compile import Options, Reason
from lite_compile.passes import find_launch_bound as module
from lite_compile.passes.attention_site import AttentionSite
from lite_compile.passes.decide_attention import Decline
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_launch_bound import find_launch_bound
from lite_compile.passes.graph_inputs import fake_tensor, size_hint

LONG = 600
"""Tokens from which on neither rule says anything here."""
LENGTHS = (128, 256, 512, 700, 1024, 128, 800)


def length_of(site: AttentionSite) -> int:
    query = fake_tensor(site.q)
    assert query is not None
    length = size_hint(query.shape[2])
    assert length is not None
    return length


def is_short(gm: fx.GraphModule) -> bool:
    (decision,) = decide(gm, Options(min_seq_len=LONG))
    return isinstance(decision, Decline) and decision.reason is Reason.SHORT


@pytest.fixture(params=["min_seq_len", "launches"])
def stays_dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[fx.GraphModule], bool]:
    if request.param == "min_seq_len":
        return is_short

    def is_launch_bound(gm: fx.GraphModule) -> bool:
        sites = find_attention(gm)
        monkeypatch.setattr(module, "_has_known_speed", lambda x: True)
        monkeypatch.setattr(module, "host_seconds", lambda *_: LONG)
        monkeypatch.setattr(module, "gpu_seconds", lambda *_: length_of(sites[0]))
        return find_launch_bound(gm, sites, Options()) is not None

    return is_launch_bound


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
