"""Which tokens of a tensor are text and which are latents: the values that `trace_tokens` computes with."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph_inputs import fake_tensor, fake_value
from .planned_nodes import Operand, plan

Size = int | Operand
"""A size or position: a number, or the node that computes it where it is symbolic."""


class Role(Enum):
    """What the tokens of a tensor stand for. Where two of them are combined, the first one names the result."""

    LATENT = "latents"
    TEXT = "text"
    OTHER = "tokens of another input"


class Segment(NamedTuple):
    """Neighbouring tokens of one role; of none if they were made from parameters or constants."""

    role: Role | None
    size: Size


@dataclass(frozen=True)
class Joint:
    """Tokens of several roles, one segment after another along one dimension."""

    dim: int
    segments: tuple[Segment, ...]
    cat: Operand
    """What put them together."""

    @property
    def roles(self) -> set[Role | None]:
        return {segment.role for segment in self.segments}


@dataclass(frozen=True)
class Lost:
    """Tokens of several roles of which nobody knows where each lies."""

    at: Operand
    """The operation that they cannot be followed through."""


Tokens = Role | Joint | Lost | None
"""None: no tokens of any input, but parameters, positions, timesteps, masks."""


def size_of(operand: Operand, dim: int) -> Size:
    """Size of one dimension of a tensor."""
    value = fake_tensor(operand)
    assert value is not None
    size = value.shape[dim]
    return size if isinstance(size, int) else plan("size", operand, dim)


def size_value(size: Size) -> int | torch.SymInt:
    """The number or symbol that a size is."""
    if isinstance(size, int):
        return size
    value = fake_value(size)
    assert isinstance(value, int | torch.SymInt)
    return value


def add(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    return left if right == 0 else right if left == 0 else plan(operator.add, left, right)


def subtract(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return left - right
    return left if right == 0 else plan(operator.sub, left, right)


def multiply(left: Size, right: Size) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    return left if right == 1 else plan(operator.mul, left, right)


def at_most(left: Size, right: Size) -> bool:
    """Whether `left <= right` for all values of the symbols. Asking adds no guard."""
    return statically_known_true(size_value(left) <= size_value(right))


def dominant(roles: Collection[Role | None]) -> Role | None:
    """The role of what several roles were mixed into."""
    return next((role for role in Role if role in roles), None)


def join(dim: int, segments: Sequence[Segment], cat: Operand) -> Tokens:
    """Segments one after another; parameters beside a single role (register tokens, padding) count as that role."""
    roles = {segment.role for segment in segments} - {None}
    if len(roles) < 2:
        return dominant(roles)
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].role is segment.role:
            segment = Segment(segment.role, add(merged.pop().size, segment.size))
        merged.append(segment)
    return Joint(dim, tuple(merged), cat)


def cut(segments: Sequence[Segment], start: Size, end: Size) -> list[Segment] | None:
    """The tokens from `start` to `end`, as far as there are that many; None if symbols hide whose they are."""
    kept: list[Segment] = []
    begin: Size = 0
    for segment in segments:
        stop = add(begin, segment.size)
        if not at_most(end, begin) and not at_most(stop, start):
            first, last = _larger(begin, start), _smaller(stop, end)
            if first is None or last is None:
                return None
            kept.append(segment if (first, last) == (begin, stop) else Segment(segment.role, subtract(last, first)))
        begin = stop
    return kept


def scale(joint: Joint, factor: Size) -> Joint:
    """The same tokens where each has become `factor` tokens."""
    return replace(joint, segments=tuple(Segment(s.role, multiply(s.size, factor)) for s in joint.segments))


def same_tokens(left: Tokens, right: Tokens) -> bool:
    """Whether two tensors provably hold the same tokens in the same places."""
    if not isinstance(left, Joint) or not isinstance(right, Joint):
        return left == right and not isinstance(left, Lost)
    return (
        left.dim == right.dim
        and [s.role for s in left.segments] == [s.role for s in right.segments]
        and all(
            statically_known_true(size_value(a.size) == size_value(b.size))
            for a, b in zip(left.segments, right.segments, strict=True)
        )
    )


def _larger(left: Size, right: Size) -> Size | None:
    return left if at_most(right, left) else right if at_most(left, right) else None


def _smaller(left: Size, right: Size) -> Size | None:
    return left if at_most(left, right) else right if at_most(right, left) else None
