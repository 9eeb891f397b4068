"""Follow text and latents through a graph: which tokens of each tensor are which."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .attention_site import AttentionSite
from .graph_inputs import fake_tensor
from .join_padded import join_padded
from .move_tokens import (
    SPLITS,
    argument,
    function_name,
    keep_tokens,
    moved_tokens,
    moves_tokens,
    restored_tokens,
    slice_tokens,
    split_part,
)
from .planned_nodes import Operand, PlannedNode
from .pointwise_steps import same_shape
from .token_roles import (
    Joint,
    Lost,
    Role,
    Tokens,
    dominant,
    join,
    same_tokens,
)
from .trace_product import as_product
from .trace_projections import is_product
from .write_tokens import WrittenTokens
from .writes import writes

_FRESH = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
_CATS: dict[str, int | None] = {
    "cat": None, "concat": None, "concatenate": None, "vstack": 0, "row_stack": 0, "hstack": 1, "column_stack": 1,
    "dstack": 2,
}  # fmt: skip
"""What puts tensors of three or more dimensions one after another, and along which; None: an argument says it."""
_MERGES = {
    "where", "slice_scatter", "select_scatter", "diagonal_scatter", "scatter", "scatter_add", "scatter_reduce",
    "index_copy", "index_add", "index_put", "index_reduce", "masked_scatter", "put",
}  # fmt: skip
"""What takes some elements from one tensor and some from another: where, cannot be told."""


class TokenTrace(WrittenTokens):
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
            return self._stack(node) if name == "stack" else self._concatenate(node, out.dim())
        if name in _MERGES:
            return self._merge(node)
        source: Any = node.args[0] if node.args else None
        if name == "getitem" and fake_tensor(source) is None:
            return self._part(node, *node.args)
        if (padded := join_padded(node)) is not None:
            return self._joined(node, *padded)
        if name == "embedding" and isinstance(self[argument(node, 1, "weight", None)], Joint):
            return Lost(node)
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

    def _joined(self, node: Operand, parts: Sequence[Operand], dim: int) -> Tokens:
        """Tensors one after another along one dimension."""
        segments = [self._segments(part, dim) for part in parts]
        known = [segment for part in segments if part is not None for segment in part]
        return join(dim, known, node) if None not in segments else Lost(node)

    def _merge(self, node: Operand) -> Tokens:
        """Elements of several tensors: known as long as all that have tokens hold the same single kind."""
        values = {tokens for x in node.all_input_nodes if (tokens := self[x]) is not None}
        only = values.pop() if len(values) == 1 else None
        return only if not values and (only is None or isinstance(only, Role)) else Lost(node)

    def _product(self, node: Operand) -> Tokens:
        """A product keeps the tokens of its first operand, unless it sums over them."""
        product = as_product(node)
        if product is not None:
            mixed = False
            for operand, labels in ((product.left, product.left_labels), (product.right, product.right_labels)):
                tokens = self[operand]
                if not isinstance(tokens, Joint):
                    if tokens is not None:
                        return tokens
                elif labels[tokens.dim] in product.labels:
                    return replace(tokens, dim=product.labels.index(labels[tokens.dim]))
                else:
                    mixed = True
            if mixed:
                return Lost(node)
        source = next((x for x in node.all_input_nodes if self[x] is not None), None)
        tokens, value = self[source], fake_tensor(source)
        if isinstance(tokens, Joint) and value is not None:
            if function_name(node) == "matmul" and source is not node.args[0] and tokens.dim == value.dim() - 2:
                return Lost(node)
            channels = 1 if "conv" in function_name(node) else value.dim() - 1
            if tokens.dim == channels:
                return dominant(tokens.roles)
        return self._combine(node, node.all_input_nodes)

    def _concatenate(self, node: Operand, rank: int) -> Tokens:
        parts, dim = _concatenated(node)
        if any(getattr(fake_tensor(part), "ndim", rank) != rank for part in parts) or dim >= rank:
            return self._combine(node, node.all_input_nodes)  # vectors, stacked
        values = [self[part] for part in parts]
        lost = next((tokens for tokens in values if isinstance(tokens, Lost)), None)
        if lost is not None:
            return lost
        across = [tokens for tokens in values if isinstance(tokens, Joint) and tokens.dim != dim]
        if across:
            return across[0] if _agree(values, across[0]) else Lost(node)
        return self._joined(node, parts, dim)

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


def _concatenated(node: Operand) -> tuple[Sequence[Operand], int]:
    """Operands of a `cat` or `stack`, and the dimension of the result along which they lie."""
    out = fake_tensor(node)
    assert out is not None
    parts = argument(node, 0, "tensors", ())
    along = _CATS.get(function_name(node))
    return parts, along if along is not None else argument(node, 1, "dim", node.kwargs.get("axis", 0)) % out.dim()


def _agree(values: Iterable[Tokens], first: Tokens) -> bool:
    """Whether all tensors that have tokens hold the same ones in the same places."""
    return all(tokens is None or same_tokens(tokens, first) for tokens in values)
