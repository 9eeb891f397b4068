"""Cosines and sines that a graph computes are laid out once, rather than anew for each kernel that reads them.

Inductor does not keep what a view of a computed tensor shows: each kernel that is handed the view gets a copy of its
own, two per layer for Wan's, as large as a head of q.
"""

from __future__ import annotations

import operator

from torch import fx

from .graph_inputs import fake_tensor, placeholders, storages
from .planned_nodes import copy_origin
from .pointwise_steps import is_dense
from .writes import writes


class SharedTables:
    """One dense copy per table of a graph, for all that read it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._kept: set[int] = set().union(*map(storages, placeholders(graph)))
        """Storages that are in memory anyway, or that are written to, so that a copy would be out of date."""
        for node in graph.nodes:
            if node.op == "get_attr":
                self._kept |= storages(node)
            elif writes(node):
                self._kept |= set().union(*map(storages, node.all_input_nodes))
        self._shared: dict[tuple[fx.Node, str], fx.Node] = {}

    def share(self, table: fx.Node) -> fx.Node:
        """The copy of `table`, which is made right after the first of the nodes that show the same part of a tensor.

        It is `table` itself if that is dense, an input of the graph or a part of one, or written to.
        """
        fake = fake_tensor(table)
        if fake is None or is_dense(fake) or not self._kept.isdisjoint(storages(table)):
            return table
        source = table.args[0] if table.target is operator.getitem else None
        key = (source, str(table.args[1])) if isinstance(source, fx.Node) else (table, "")
        if key not in self._shared:
            with self._graph.inserting_after(table):
                made = self._graph.call_method("contiguous", (table,))
            made.meta["example_value"] = fake.contiguous()
            copy_origin(table, made)
            self._shared[key] = made
        return self._shared[key]
