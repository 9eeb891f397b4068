"""Positions that the user protects."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from graphs import TOKENS, Denoiser, capture, inputs
from joint_models import JOINT_MODELS
from torch import fx

from lite_compile import Options
from lite_compile.backend import rewrite_graph
from lite_compile.options import Positions
from lite_compile.passes.attention_site import Protection
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.graph_inputs import fake_mode, fake_value, placeholders
from lite_compile.passes.planned_nodes import emit
from lite_compile.passes.protect_positions import disjoint_ranges, protect_positions
from lite_compile.passes.token_roles import size_of, size_value

BOUNDS = (0, 3, 7, 12, 40, -1, -5, -12, -40)
PAIRS: list[Positions] = [
    (start, end)
    for start, end in itertools.product(BOUNDS, (*BOUNDS, None))
    if end is None or start >= 0 > end or (start < end and (start < 0) == (end < 0))
]


def covered(positions: Sequence[Positions], length: int) -> set[int]:
    return {token for start, end in positions for token in range(length)[start:end]}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_one_pair_is_a_slice(pair: Positions) -> None:
    for length in (1, 5, 12, 13, 100):
        found = disjoint_ranges([pair], length)
        assert {token for start, end in found for token in range(start, end)} == covered([pair], length)


def test_several_pairs_cover_what_they_cover_and_never_overlap() -> None:
    choose = random.Random(0)
    for _ in range(500):
        pairs, length = choose.sample(PAIRS, choose.randint(1, 4)), choose.randint(1, 60)
        found = disjoint_ranges(pairs, length)
        assert {token for start, end in found for token in range(start, end)} == covered(pairs, length)
        bounds = list(itertools.chain(*found))
        assert bounds == sorted(bounds)
        assert all(start < end for start, end in found)


@pytest.mark.parametrize("positions", [[(0, 8), (-8, None)], [(60, 70), (-20, -2), (5, -30)], [(0, 100)]], ids=str)
def test_symbolic_lengths_are_computed_in_the_graph_without_a_guard(positions: list[Positions]) -> None:
    gm = capture(Denoiser(), *inputs(batch=2), dynamic=True)
    shape_env = fake_mode(gm).shape_env
    assert shape_env is not None
    (site,) = find_attention(gm)
    guards = len(shape_env.guards)
    (protected,) = protect_positions([site], positions)
    assert len(shape_env.guards) == guards

    assert isinstance(protected.protection, Protection)
    bounds = list(itertools.chain(*protected.protection.ranges))
    with gm.graph.inserting_before(site.node):
        nodes = emit(gm.graph, bounds, {}, like=site.node)
    gm.graph.output_node().args = (tuple(nodes),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    length = size_value(size_of(site.q, 2))
    assert isinstance(length, torch.SymInt)
    for tokens in (4, 40, TOKENS, 80):
        numbers = gm(*arguments(gm, length, tokens))
        assert list(numbers) == sorted(numbers)
        ranges = zip(numbers[::2], numbers[1::2], strict=True)
        assert {token for start, end in ranges for token in range(start, end)} == covered(positions, tokens)


def arguments(gm: fx.GraphModule, length: torch.SymInt, tokens: int) -> list[Any]:
    """Inputs of a graph where the symbol `length` is `tokens` and others are 2."""

    def known(size: int | torch.SymInt) -> int:
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        return int(expression.subs({s: tokens if s == length.node.expr else 2 for s in expression.free_symbols}))

    values = map(fake_value, placeholders(gm.graph))
    return [torch.ones([known(d) for d in x.shape]) if isinstance(x, torch.Tensor) else known(x) for x in values]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("protect", "expected", "found"),
    [
        ("auto", ((0, 16),), "text: cat in "),
        ([(-5, None)], ((59, 64),), "option protect"),
        ([], (), ""),
        (None, (), ""),
    ],
    ids=str,
)
def test_the_option_takes_the_place_of_what_is_found(protect: Any, expected: Any, found: str) -> None:
    flux, call, text = JOINT_MODELS["flux"]()
    _, _, report = rewrite_graph(capture(flux, **call), Options(min_seq_len=1, protect=protect))
    assert [site.layer for site in report.sites if site.rewritten] == list(text)
    assert {site.protected for site in report.sites} == {expected}
    assert all(site.protected_by.startswith(found) for site in report.sites)


def test_ranges_are_handed_to_the_op() -> None:
    options = Options(min_seq_len=1, protect=[(-8, None), (0, 4)])
    gm, _, _ = rewrite_graph(capture(Denoiser(), *inputs()), options)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lite_compile.attend.default)
    assert node.kwargs == {"protected": [0, 4, TOKENS - 8, TOKENS]}


def test_ranges_beyond_the_sequence_protect_nothing() -> None:
    gm, _, report = rewrite_graph(capture(Denoiser(), *inputs()), Options(min_seq_len=1, protect=[(TOKENS, None)]))
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lite_compile.attend.default)
    assert node.kwargs == {}
    assert (report.sites[0].protected, report.sites[0].protected_by) == ((), "")
