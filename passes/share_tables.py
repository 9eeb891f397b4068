"""Cosines and sines that a graph computes are laid out once, rather than anew for each kernel that reads them.

Inductor does not keep what a view of a computed tensor shows: each kernel that is handed the view gets a copy of its
own, two per layer for Wan's, as large as a head of q.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from .graph_inputs import fake_tensor, placeholders, storages
from .planned_nodes import copy_origin
from .pointwise_steps import is_dense
from .writes import writes

_Key = tuple[fx.Node, str]
"""Nodes that have the same one show the same."""


class SharedTables:
    """One dense copy per table of a graph, for all that read it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._kept: set[int] = set().union(*map(storages, placeholders(graph)))
        """Storages that are in memory anyway, or that are written to, so that a copy would be out of date."""
        self._first: dict[_Key, fx.Node] = {}
        for node in graph.nodes:
            self._first.setdefault(_key(node), node)
            if node.op == "get_attr":
                self._kept |= storages(node)
            elif writes(node):
                self._kept |= set().union(*map(storages, node.all_input_nodes))
        self._shared: dict[_Key, fx.Node] = {}

    def share(self, table: fx.Node) -> fx.Node:
        """The copy of `table`, made right after the first node of the graph that shows the same part of a tensor.

        It is `table` itself if that is dense, an input of the graph or a part of one, or written to.
        """
        fake = fake_tensor(table)
        if fake is None or is_dense(fake) or not self._kept.isdisjoint(storages(table)):
            return table
        key = _key(table)
        if key not in self._shared:
            first = self._first[key]
            with self._graph.inserting_after(first):
                # `contiguous` would ask whether it has to copy, which adds a guard where sizes are symbols.
                made = self._graph.call_method("clone", (first,), {"memory_format": torch.contiguous_format})
            made.meta["example_value"] = fake.clone(memory_format=torch.contiguous_format)
            copy_origin(first, made)
            self._shared[key] = made
        return self._shared[key]


def _key(node: fx.Node) -> _Key:
    """Of a part of a tensor: the tensor and the index; of anything else: the node."""
    source = node.args[0] if node.target is operator.getitem else None
    return (source, str(node.args[1])) if isinstance(source, fx.Node) else (node, "")
