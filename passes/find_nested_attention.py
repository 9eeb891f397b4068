"""Find attention in sub-graphs: those that checkpointing, `nested_compile_region` and control flow call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter

from torch import fx

from .attention_site import AttentionSite
from .find_attention import find_attention, module_path

Path = tuple[str, ...]


def find_nested_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """Attention sites in the sub-graphs of `gm`, one per use of a sub-graph. Nothing is changed.

    A sub-graph that several layers share was traced in the first of them: in the names of its sites, that layer is
    replaced by the one at hand.
    """
    return [replace(site, layer=".".join(path[1:]) or site.layer, in_subgraph=True) for path, site in _sites_below(gm)]


def _sites_below(gm: fx.GraphModule) -> Iterator[tuple[Path, AttentionSite]]:
    """The sites and the names of their modules, the root's variable first; no names where the graph has none."""
    traced_in: dict[str, Path] = {}
    for use in gm.graph.find_nodes(op="get_attr", sort=True):
        name = str(use.target)
        graph = attrgetter(name)(gm)
        if not isinstance(graph, fx.GraphModule):
            continue
        here = module_path(use)
        first = traced_in.setdefault(name, here)
        direct = [(module_path(site.origin), site) for site in find_attention(graph)]
        for path, site in (*direct, *_sites_below(graph)):
            moved = (*here, *path[len(first) :]) if path[: len(first)] == first else path or here
            yield moved, replace(site, layer=name)
