"""Segments of text and latents: joined, cut and compared."""

from __future__ import annotations

import pytest
import torch
from graphs import capture
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from lite_compile.passes.planned_nodes import Operand
from lite_compile.passes.token_roles import (
    Joint,
    Role,
    Segment,
    Tokens,
    add,
    cut,
    join,
    same_tokens,
    size_of,
    size_value,
)

CAT = fx.Graph().placeholder("cat")
ROLES = st.sampled_from([Role.LATENT, Role.TEXT, Role.OTHER, None])
SEGMENTS = st.lists(st.builds(Segment, ROLES, st.integers(1, 9)), min_size=1, max_size=6)


def spelled_out(segments: list[Segment]) -> list[Role | None]:
    """The role of each token."""
    return [segment.role for segment in segments for _ in range(int(size_value(segment.size)))]


@given(SEGMENTS, st.integers(0, 60), st.integers(0, 60))
def test_a_cut_is_a_slice(segments: list[Segment], start: int, end: int) -> None:
    part = cut(segments, start, end)
    assert part is not None
    assert spelled_out(part) == spelled_out(segments)[start:end]


@given(SEGMENTS)
def test_segments_that_are_joined_stay_in_their_places(segments: list[Segment]) -> None:
    tokens = join(1, segments, CAT)
    roles = {segment.role for segment in segments} - {None}
    if isinstance(tokens, Joint):
        assert len(roles) > 1
        assert spelled_out(list(tokens.segments)) == spelled_out(segments)
        neighbours = zip(tokens.segments, tokens.segments[1:], strict=False)
        assert all(left.role is not right.role for left, right in neighbours)
    else:
        assert {tokens} - {None} == roles


@pytest.fixture
def lengths() -> tuple[Operand, Operand]:
    """Two sequences whose lengths are different symbols."""

    def both(video: Tensor, text: Tensor) -> Tensor:
        return torch.cat([video, text])

    (node,) = capture(both, torch.ones(7, 2), torch.ones(5, 2), dynamic=True).graph.output_node().all_input_nodes
    video, text = node.args[0]  # type: ignore[misc]
    return video, text


def test_symbolic_cuts_are_made_where_they_can_be_told(lengths: tuple[Operand, Operand]) -> None:
    video, text = (size_of(node, 0) for node in lengths)
    segments = [Segment(Role.LATENT, video), Segment(Role.TEXT, text)]
    assert cut(segments, 0, video) == segments[:1]
    assert cut(segments, size_of(lengths[0], 0), add(video, text)) == segments[1:]
    assert cut(segments, video, 10**6) is None  # whether that takes all of the text depends on its length
    assert cut(segments, 0, text) is None


def test_symbolic_layouts_are_the_same_only_if_they_always_are(lengths: tuple[Operand, Operand]) -> None:
    def layout(first: Operand, second: Operand) -> Tokens:
        return join(1, [Segment(Role.LATENT, size_of(first, 0)), Segment(Role.TEXT, size_of(second, 0))], CAT)

    video, text = lengths
    assert same_tokens(layout(video, text), layout(video, text))
    assert not same_tokens(layout(video, text), layout(text, video))
