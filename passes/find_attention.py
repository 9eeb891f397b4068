"""Find the attention sites of a graph, in every spelling."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from .attention_site import AttentionSite, Declined, Spelling
from .graph_inputs import fake_tensor
from .match_flex_attention import FlexAttentionSpelling
from .match_fused_op import FusedOpSpelling
from .match_multi_head_attention import MultiheadAttentionSpelling
from .match_sdpa import SdpaSpelling
from .match_softmax_attention import SoftmaxSpelling
from .share_heads import share_heads
from .spelling_registry import registered_spellings

BUILT_IN: tuple[Spelling, ...] = (
    SdpaSpelling(),
    FusedOpSpelling(),
    MultiheadAttentionSpelling(),
    FlexAttentionSpelling(),
    SoftmaxSpelling(),
)


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """All attention sites of `gm` in execution order. The graph is not changed.

    What two spellings find belongs to the first of them: those that the user registered, the latest first, then ours.
    """
    found: list[AttentionSite] = []
    taken: set[fx.Node] = set()
    for spelling in (*registered_spellings(), *BUILT_IN):
        for node in gm.graph.nodes:
            if node.op not in ("call_function", "call_method") or node in taken:
                continue
            site = _match(spelling, node)
            if site is not None and site.node not in taken:
                found.append(site)
                taken |= {node, site.node, *site.inner}
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    found.sort(key=lambda site: position[site.node])
    names = layer_names([site.origin for site in found])
    return [dataclasses.replace(share_heads(site), layer=name) for site, name in zip(found, names, strict=True)]


def _match(spelling: Spelling, node: fx.Node) -> AttentionSite | None:
    try:
        site = spelling.pattern(node)
        declined = None if site is None else spelling.check(site)
    except Exception as error:
        if any(map(_is_transformed, (node, *node.all_input_nodes))):
            return None  # nothing can be planned with its fake values: they are no use outside of the transform
        raise RuntimeError(f"attention spelling {spelling.name!r} failed at {node.format_node()}") from error
    if site is None:
        return None
    if not isinstance(site, AttentionSite) or not isinstance(declined, Declined | None):
        raise TypeError(
            f"attention spelling {spelling.name!r} returned {site!r} from pattern and {declined!r} from check; "
            "allowed: an AttentionSite or None, and a Declined or None"
        )
    return dataclasses.replace(site, spelling=spelling, declined=declined)


def _is_transformed(node: fx.Node) -> bool:
    """Whether a node is part of what `torch.func` transforms, such as the body of a vmap."""
    value = fake_tensor(node)
    return value is not None and is_functorch_wrapped_tensor(value)


def layer_names(nodes: Sequence[fx.Node]) -> list[str]:
    """Qualified name of the module that each of `nodes` was traced in, such as `blocks.0.attn1`.

    Names are relative to the root that they share, whatever variable holds it (`self` as a rule). Where a function that
    calls several models was compiled, they begin with that variable.
    """
    paths = [module_path(node) for node in nodes]
    roots = {path[:1] for path in paths if path}
    names = [".".join(path[1:] if len(roots) == 1 else path) for path in paths]
    return [name or f"attention_{number}" for number, name in enumerate(names)]


def is_made_up(name: str) -> bool:
    """Whether a layer name is a number that `layer_names` gave to attention outside of any module but the root."""
    return re.fullmatch(r"attention_\d+", name) is not None


def module_path(node: fx.Node) -> tuple[str, ...]:
    """Root variable and attribute names of the innermost module that `node` was traced in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules\b", "", path)
    path = re.sub(r"\['([^']+)'\]|\[(\d+)\]", lambda match: f".{match.group(1) or match.group(2)}", path)
    return tuple(part for part in re.sub(r"^[LG]\.", "", path).split(".") if part and part != "_orig_mod")
