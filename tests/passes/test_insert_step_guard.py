from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from graphs import Denoiser, capture, inputs

from lite_compile.clock import clock_words
from lite_compile.clock_source import ClockSource
from lite_compile.ops import NOW_WORDS
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_clock_inputs import ClockInputs, find_clock_inputs
from lite_compile.passes.graph_inputs import copy_graph, fake_tensor, placeholders
from lite_compile.passes.insert_step_guard import insert_step_guard
from lite_compile.trajectory import DenseSteps


def lines_with(gm: torch.fx.GraphModule, text: str) -> str:
    gm.recompile()
    return "\n".join(line.split(";")[0].strip() for line in gm.code.splitlines() if text in line and "def " not in line)


def test_clock_is_advanced_once_before_anything_else() -> None:
    gm = copy_graph(capture(Denoiser(cross=True), *inputs()))
    clock = find_clock_inputs(gm, find_attention(gm))
    assert isinstance(clock, ClockInputs)
    now = insert_step_guard(gm, clock, 3, torch.device("cpu"))
    gm.graph.lint()
    assert_expected_inline(
        lines_with(gm, "advance"),
        """\
now = lite_compile_clock_advance(lite_clock, l_hidden_states_, l_timestep_, [l_prompt_], 3)""",
    )
    assert fake_tensor(placeholders(gm.graph)[-1]).shape == (clock_words(3, 1),)  # type: ignore[union-attr]
    assert now.prev is placeholders(gm.graph)[-1]


def guards(pattern: str, **options: Any) -> str:
    """The lines that match in a graph with a clock of its own, and in one whose clock is announced."""
    captured = capture(Denoiser(), *inputs())
    lines = []
    for announced in (False, True):
        gm = copy_graph(captured)
        clock = ClockSource.ANNOUNCED if announced else find_clock_inputs(gm, find_attention(gm))
        assert not isinstance(clock, str)
        insert_step_guard(gm, clock, 3, torch.device("cpu"), **options)
        lines.append(lines_with(gm, pattern))
    return "\n".join(lines)


def test_dense_steps_are_told_to_the_clock() -> None:
    assert_expected_inline(
        guards("(2, 0.1)", dense_steps=DenseSteps(2, 0.1)),
        """\
now = lite_compile_clock_advance(lite_clock, l_hidden_states_, l_timestep_, [], 3, (2, 0.1))
now = lite_compile_announce_read_announced(lite_clock, 3, (2, 0.1))""",
    )


def test_refreshes_are_told_to_the_clock() -> None:
    assert_expected_inline(
        guards("refresh", refresh_every=5),
        """\
now = lite_compile_clock_advance(lite_clock, l_hidden_states_, l_timestep_, [], 3, refresh_every = 5)
now = lite_compile_announce_read_announced(lite_clock, 3, refresh_every = 5)""",
    )


def test_announced_clock_reads_no_inputs() -> None:
    gm = copy_graph(capture(Denoiser(), *inputs()))
    insert_step_guard(gm, ClockSource.ANNOUNCED, 4, torch.device("cpu"))
    gm.graph.lint()
    assert_expected_inline(
        lines_with(gm, "announced"),
        """\
now = lite_compile_announce_read_announced(lite_clock, 4)""",
    )


def test_a_clock_kept_by_hooks_comes_in_as_what_it_reads() -> None:
    gm = copy_graph(capture(Denoiser(), *inputs()))
    before = len(gm.graph.nodes)
    now = insert_step_guard(gm, ClockSource.ROOT, 4, torch.device("cpu"))
    gm.graph.lint()
    assert now is placeholders(gm.graph)[-1]
    assert fake_tensor(now).shape == (NOW_WORDS,)  # type: ignore[union-attr]
    assert len(gm.graph.nodes) == before + 1
