"""What a spelling of attention is, and what it finds: one attention site, however it was written."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from ..decisions import Reason
from .planned_nodes import Operand
from .token_roles import Size


class Declined(NamedTuple):
    """Why a site has to stay dense."""

    reason: Reason
    detail: str = ""


class Protection(NamedTuple):
    """Tokens whose tiles are always computed, as keys and as queries."""

    ranges: tuple[tuple[Size, Size], ...] = ()
    """Positions in the site's sequence, half-open, in their order."""
    found: str = ""
    """How they were found."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention, with the arguments that `scaled_dot_product_attention` would have."""

    node: fx.Node
    """The node whose value is replaced."""
    q: Any
    """`[B, H, Sq, D]`, a node of the graph or one made by `plan`; whatever the graph has if `declined` says why."""
    k: Any
    """`[B, H, Sk, D]`."""
    v: Any
    """`[B, H, Sk, D]`."""
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    """A number, or None for 1 / sqrt(D), or the node that computes it."""
    enable_gqa: Any = False
    inner: tuple[fx.Node, ...] = ()
    """Nodes that have no purpose without `node`, its centre first; those that nothing else uses go with it."""
    copies: tuple[fx.Node, ...] = ()
    """Nodes that repeated heads of k and v; those that nothing else uses go with `node`. Filled in by `share_heads`."""
    match: Any = None
    """What `pattern` found and `check` and `rewrite` want to know."""
    layer: str = ""
    """Name of the module, such as `blocks.0.attn1`; filled in by `find_attention`, as are the two below."""
    spelling: Spelling | None = None
    declined: Declined | None = None
    protection: Protection | Declined = Protection()
    """Filled in by `find_joint_tokens` or `protect_positions`."""
    in_subgraph: bool = False
    """Whether it belongs to a graph that an operator of the captured one calls."""

    @property
    def origin(self) -> fx.Node:
        """The node of the attention that knows its module: of an op with several results, not the result."""
        return self.inner[0] if self.inner else self.node

    def restore(self, out: Operand) -> Operand:
        """What stands in place of `node` if `out` is `[B, H, Sq, D]`, the attention's result."""
        return out if self.spelling is None else self.spelling.rewrite(self, out)


class Spelling:
    """A way to write attention. One object serves all graphs and keeps nothing between two calls.

    None of the methods may change the graph: `pattern` and `check` look at it, `rewrite` plans new nodes with `plan`.
    """

    name: str = ""

    def pattern(self, node: fx.Node) -> AttentionSite | None:
        """The attention that `node` is the centre of, or None. Called for every node that calls something."""
        raise NotImplementedError

    def check(self, site: AttentionSite) -> Declined | None:
        """Why the site cannot be rewritten, beyond what holds for every spelling."""
        return None

    def rewrite(self, site: AttentionSite, out: Operand) -> Operand:
        """Bring the result `out`, `[B, H, Sq, D]`, to the shape and dtype of `site.node`."""
        return out


def first_result(node: fx.Node) -> fx.Node | None:
    """The node of the attention's result: `node` itself, or the first of its several results; None if it has no use."""
    if isinstance(node.meta.get("example_value"), torch.Tensor):
        return node
    firsts = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    return firsts[0] if len(firsts) == 1 else None


def other_results_used(node: fx.Node) -> bool:
    """Whether anything but the first of several results of `node` is used."""
    if isinstance(node.meta.get("example_value"), torch.Tensor):
        return False
    others = [user for user in node.users if user.target is not operator.getitem or user.args[1] != 0]
    return not all(map(_is_dead, others))


def dead_ends(node: fx.Node) -> tuple[fx.Node, ...]:
    """What is computed from `node` for nothing: Dynamo leaves the arithmetic on results that the user's code drops."""
    dead = [user for user in node.users if _is_dead(user)]
    return tuple(dict.fromkeys((*dead, *(end for user in dead for end in dead_ends(user)))))


def _is_dead(node: fx.Node) -> bool:
    return node.op != "output" and node.target is not operator.setitem and all(map(_is_dead, node.users))
