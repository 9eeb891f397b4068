"""Find the attention sites of a graph: every `scaled_dot_product_attention`, in both call styles."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_SDPA = torch._C._nn.scaled_dot_product_attention
_SDPA_TARGETS = (
    _SDPA,
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def _sdpa(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False, *,
    scale: Any = None, enable_gqa: Any = False,
) -> None:  # fmt: skip
    """Signature of `torch.nn.functional.scaled_dot_product_attention`."""


_SIGNATURE = inspect.signature(_sdpa)


@dataclass(frozen=True)
class AttentionSite:
    """One attention call: its node and its arguments, whichever way they were written."""

    node: fx.Node
    layer: str
    q: Any
    k: Any
    v: Any
    attn_mask: Any
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any
    in_subgraph: bool = False
    """Whether it belongs to a graph that an operator of the captured one calls."""


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """All attention sites of `gm` in execution order. The graph is not changed."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _SDPA_TARGETS]
    sites: list[AttentionSite] = []
    for node, layer in zip(nodes, layer_names(nodes), strict=True):
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        q, k, v, *rest = bound.arguments.values()
        sites.append(AttentionSite(node, layer, q, k, v, *rest))
    return sites


def layer_names(nodes: Sequence[fx.Node]) -> list[str]:
    """Qualified name of the module that each of `nodes` was traced in, such as `blocks.0.attn1`.

    Names are relative to the root that they share, whatever variable holds it (`self` as a rule). Where a function that
    calls several models was compiled, they begin with that variable.
    """
    paths = [module_path(node) for node in nodes]
    roots = {path[:1] for path in paths if path}
    names = [".".join(path[1:] if len(roots) == 1 else path) for path in paths]
    return [name or f"attention_{number}" for number, name in enumerate(names)]


def module_path(node: fx.Node) -> tuple[str, ...]:
    """Root variable and attribute names of the innermost module that `node` was traced in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules\b", "", path)
    path = re.sub(r"\['([^']+)'\]|\[(\d+)\]", lambda match: f".{match.group(1) or match.group(2)}", path)
    return tuple(part for part in re.sub(r"^[LG]\.", "", path).split(".") if part and part != "_orig_mod")
