"""Follow text and latents through a graph: which tokens of each tensor are which."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .attention_site import AttentionSite
from .graph_inputs import fake_tensor, storages
from .move_tokens import (
    SPLITS,
    argument,
    expand_index,
    function_name,
    gathers,
    keep_tokens,
    moved_tokens,
    moves_tokens,
    restored_tokens,
    slice_bounds,
    slice_tokens,
    split_part,
)
from .planned_nodes import Operand, PlannedNode, plan
from .pointwise_steps import same_shape, writes
from .token_roles import (
    Joint,
    Lost,
    Role,
    Segment,
    Tokens,
    cut,
    dominant,
    join,
    same_tokens,
    size_of,
)
from .trace_product import as_product
from .trace_projections import is_product

_FRESH = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
_SCATTERS = {"index_copy_", "index_add_", "index_put_", "scatter_", "scatter_add_", "masked_scatter_", "put_"}
_REPLACES = {"copy_", *_SCATTERS}
"""What is written by these does not mix with what was there."""
_CATS = {"cat", "concat", "concatenate"}


class TokenTrace:
    """What is known about the tokens of each tensor of one graph, and of nodes planned for it."""

    def __init__(self, graph: fx.Graph, sites: Sequence[AttentionSite], inputs: Mapping[fx.Node, Role]) -> None:
        """
        Args:
            sites: attention of the graph; the tokens of its result are those of its queries.
            inputs: roles of the graph's inputs; those that are left out have no tokens.
        """
        self._tokens: dict[Operand, Tokens] = dict(inputs.items())
        attention = {site.node: site for site in sites}
        for node in graph.nodes:
            if node.target is operator.setitem:
                self._write(node, *node.args)
            elif node.op in ("call_function", "call_method"):
                self._tokens[node] = self._attended(attention[node]) if node in attention else self._infer(node)
                if writes(node):
                    self._write_in_place(node)

    def __getitem__(self, operand: object) -> Tokens:
        if isinstance(operand, PlannedNode) and operand not in self._tokens:
            self._tokens[operand] = self._infer(operand)
        return self._tokens.get(operand) if isinstance(operand, fx.Node | PlannedNode) else None

    def _attended(self, site: AttentionSite) -> Tokens:
        """Tokens of an attention's result: its queries, or what queries that are parameters (a resampler) gather."""
        queries, values = self[site.q], self[site.v]
        if isinstance(queries, Joint):
            return restored_tokens(site, queries) if site.declined is None else self._infer(site.node)
        return values if queries is None and isinstance(values, Role) else queries

    def _infer(self, node: Operand) -> Tokens:
        """Tokens of the result of a call, from those of its arguments."""
        out = fake_tensor(node)
        name = function_name(node)
        if out is None or out.dtype == torch.bool or name in _FRESH:
            return None
        if name in (*_CATS, "stack") and isinstance(argument(node, 0, "tensors", None), list | tuple):
            return self._stack(node) if name == "stack" else self._concatenate(node)
        source: Any = node.args[0] if node.args else None
        if name == "getitem" and fake_tensor(source) is None:
            return self._part(node, *node.args)
        tokens = self[source]
        if isinstance(tokens, Joint) and moves_tokens(node):
            return moved_tokens(tokens, source, node)
        return self._product(node) if is_product(node) else self._combine(node, node.all_input_nodes)

    def _combine(self, node: Operand, operands: Iterable[Operand]) -> Tokens:
        """A function that keeps each token in its place: pointwise, a norm, a residual.

        Operands that are not of the result's shape modulate the others.
        """
        known = [x for x in operands if self[x] is not None and fake_tensor(x) is not None]
        leading = [x for x in known if same_shape(x, node)] or known
        values = [(x, self[x]) for x in leading]
        moved = [keep_tokens(tokens, x, node) for x, tokens in values if isinstance(tokens, Joint)]
        if moved:
            return moved[0] if all(same_tokens(other, moved[0]) for other in moved) else Lost(node)
        roles = [tokens for _, tokens in values if isinstance(tokens, Role)]
        return dominant(roles) if roles else next((tokens for _, tokens in values), None)

    def _product(self, node: Operand) -> Tokens:
        """A product keeps the tokens of its first operand, unless it sums over them."""
        product = as_product(node)
        if product is not None:
            for operand, labels in ((product.left, product.left_labels), (product.right, product.right_labels)):
                tokens = self[operand]
                if not isinstance(tokens, Joint):
                    if tokens is not None:
                        return tokens
                elif labels[tokens.dim] in product.labels:
                    return replace(tokens, dim=product.labels.index(labels[tokens.dim]))
        source = next((x for x in node.all_input_nodes if self[x] is not None), None)
        tokens, value = self[source], fake_tensor(source)
        if isinstance(tokens, Joint) and value is not None:
            channels = 1 if "conv" in function_name(node) else value.dim() - 1
            if tokens.dim == channels:
                return dominant(tokens.roles)
        return self._combine(node, node.all_input_nodes)

    def _concatenate(self, node: Operand) -> Tokens:
        parts, dim = _concatenated(node)
        values = [self[part] for part in parts]
        lost = next((tokens for tokens in values if isinstance(tokens, Lost)), None)
        if lost is not None:
            return lost
        across = [tokens for tokens in values if isinstance(tokens, Joint) and tokens.dim != dim]
        if across:
            return across[0] if _agree(values, across[0]) else Lost(node)
        segments = [self._segments(part, dim) for part in parts]
        known = [segment for part in segments if part is not None for segment in part]
        return join(dim, known, node) if None not in segments else Lost(node)

    def _stack(self, node: Operand) -> Tokens:
        parts, dim = _concatenated(node)
        values = [tokens for part in parts if (tokens := self[part]) is not None]
        if not values:
            return None
        if not _agree(values, values[0]):
            return Lost(node)
        first = values[0]
        return replace(first, dim=first.dim + (first.dim >= dim)) if isinstance(first, Joint) else first

    def _part(self, node: Operand, parent: Any, index: int) -> Tokens:
        """One of several results of a call."""
        name, source = function_name(parent), parent.args[0] if parent.args else None
        tokens, value = self[source], fake_tensor(source)
        if name not in SPLITS and name != "unbind":
            return self._combine(node, parent.all_input_nodes)
        if not isinstance(tokens, Joint) or value is None:
            return tokens
        dim = argument(parent, 1 if name == "unbind" else 2, "dim", 0) % value.dim()
        if name == "unbind":
            return Lost(node) if dim == tokens.dim else replace(tokens, dim=tokens.dim - (tokens.dim > dim))
        if dim != tokens.dim:
            return tokens
        _, start, end = split_part(node, parent, index, dim)
        return slice_tokens(tokens, start, end, node)

    def _write(self, node: fx.Node, target: Any, index: Any, value: Any) -> None:
        """`target[index] = value`."""
        old, new, shape = self[target], self[value], fake_tensor(target)
        if new is None or isinstance(old, Lost) or shape is None:
            return
        items = expand_index(index, shape)
        if gathers(items):
            self._mix(node, target, new)
        elif not same_tokens(self[plan(operator.getitem, target, index)], new):
            self._tokens[target] = self._overwritten(node, target, items, new)

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
        elif target.target is operator.getitem and source is not None:
            self._write(node, source, target.args[1], value)
        else:
            self._tokens[target] = self[value]
            while source is not None:
                self._mix(node, source, self[value])
                source = self._viewed(source)

    @staticmethod
    def _viewed(view: Operand) -> Operand | None:
        """What a tensor is a view of."""
        source = view.args[0] if view.args else None
        if not isinstance(source, fx.Node) or fake_tensor(source) is None or storages(source) != storages(view):
            return None
        return source

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


def _concatenated(node: Operand) -> tuple[Sequence[Operand], int]:
    """Operands of a `cat` or `stack`, and the dimension of the result along which they lie."""
    out = fake_tensor(node)
    assert out is not None
    parts = argument(node, 0, "tensors", ())
    return parts, argument(node, 1, "dim", node.kwargs.get("axis", 0)) % out.dim()


def _is_whole(item: Any, size: int | torch.SymInt) -> bool:
    """Whether one item of an index takes all there is in its dimension."""
    return item == slice(None) or (item == 0 and size == 1)


def _agree(values: Iterable[Tokens], first: Tokens) -> bool:
    """Whether all tensors that have tokens hold the same ones in the same places."""
    return all(tokens is None or same_tokens(tokens, first) for tokens in values)
