"""What becomes of text and latents where one tensor is written into another."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .graph_inputs import fake_tensor, storages
from .move_tokens import expand_index, function_name, gathers, slice_bounds
from .planned_nodes import Operand, plan
from .token_roles import Joint, Lost, Role, Segment, Tokens, cut, join, same_tokens, size_of

_SCATTERS = {"index_copy_", "index_add_", "index_put_", "scatter_", "scatter_add_", "masked_scatter_", "put_"}
_REPLACES = {"copy_", *_SCATTERS}
"""What is written by these does not mix with what was there."""


class WrittenTokens:
    """The part of `TokenTrace` that follows writes in place."""

    _tokens: dict[Operand, Tokens]

    def __getitem__(self, operand: object) -> Tokens:
        raise NotImplementedError

    def _write(self, node: fx.Node, target: Any, index: Any, value: Any) -> None:
        """`target[index] = value`."""
        old, new, shape = self[target], self[value], fake_tensor(target)
        if new is None or isinstance(old, Lost) or shape is None:
            return
        items = expand_index(index, shape)
        if gathers(items):
            self._mix(node, target, new)
        elif same_tokens(self[plan(operator.getitem, target, index)], new):
            return
        else:
            self._tokens[target] = self._overwritten(node, target, items, new)
        self._mix_bases(node, target, new)

    def _write_in_place(self, node: fx.Node) -> None:
        """`target.copy_(value)` and the like: `node` is the target from then on."""
        target: Any = node.args[0] if node.args else None
        replaces = function_name(node) in _REPLACES
        others = [x for x in node.all_input_nodes if x is not target and self[x] is not None] if replaces else [node]
        if fake_tensor(target) is None or not others or same_tokens(self[target], self[others[0]]):
            return
        value, source = others[0], self._viewed(target)
        if function_name(node) in _SCATTERS:
            self._mix(node, target, self[value])
            self._mix_bases(node, target, self[value])
        elif target.target is operator.getitem and source is target.args[0]:
            self._write(node, source, target.args[1], value)
        else:
            self._tokens[target] = self[value]
            self._mix_bases(node, target, self[value])

    @staticmethod
    def _viewed(view: Operand) -> fx.Node | None:
        """What a tensor is a view of, or one of several views."""
        source = view.args[0] if view.args else None
        if isinstance(source, fx.Node) and fake_tensor(source) is None:
            source = source.args[0] if source.args else None
        if not isinstance(source, fx.Node) or fake_tensor(source) is None or storages(source) != storages(view):
            return None
        return source

    def _mix_bases(self, node: fx.Node, view: Operand, new: Tokens) -> None:
        """Tokens are written to a view: what it is a view of holds them somewhere."""
        while (source := self._viewed(view)) is not None:
            self._mix(node, source, new)
            view = source

    def _mix(self, node: fx.Node, target: Operand, new: Tokens) -> None:
        """Tokens are written to places of `target` that cannot be told."""
        self._tokens[target] = new if self[target] in (None, new) and isinstance(new, Role) else Lost(node)

    def _overwritten(self, node: fx.Node, target: Operand, items: Sequence[Any], new: Tokens) -> Tokens:
        shape = fake_tensor(target)
        assert shape is not None
        partial = [dim for dim, item in enumerate(items) if item is None or not _is_whole(item, shape.shape[dim])]
        if not partial:
            return new
        dim = partial[0]
        total, segments = size_of(target, dim), self._segments(target, dim)
        bounds = slice_bounds(items[dim], total)
        if len(partial) > 1 or bounds is None or segments is None or not isinstance(new, Role):
            return Lost(node)
        start, end = bounds
        pieces = [cut(segments, 0, start), cut([Segment(new, total)], start, end), cut(segments, end, total)]
        known = [segment for piece in pieces if piece is not None for segment in piece]
        return join(dim, known, node) if None not in pieces else Lost(node)

    def _segments(self, operand: Operand, dim: int) -> Sequence[Segment] | None:
        """The tensor as segments along `dim`; None if its tokens do not lie along it or are unknown."""
        tokens = self[operand]
        if isinstance(tokens, Joint):
            return tokens.segments if tokens.dim == dim else None
        return None if isinstance(tokens, Lost) else (Segment(tokens, size_of(operand, dim)),)


def _is_whole(item: Any, size: int | torch.SymInt) -> bool:
    """Whether one item of an index takes all there is in its dimension."""
    return item == slice(None) or (item == 0 and size == 1)
