"""Where the tokens of a tensor are after it was viewed, permuted, sliced or gone through a pointwise function."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import ops
from .attention_site import AttentionSite
from .graph_inputs import fake_tensor, fake_value
from .planned_nodes import Operand, PlannedNode, plan, planned_result
from .token_roles import (
    Joint,
    Lost,
    Size,
    Tokens,
    add,
    at_most,
    cut,
    join,
    multiply,
    scale,
    size_of,
)
from .trace_operand import permutation_of

SPLITS = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")


def function_name(node: Operand) -> str:
    """Name of the function or method that a node calls, without the overload."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).split(".")[0]


def argument(node: Operand, position: int, name: str, default: Any) -> Any:
    """One argument of a call, however it was passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def moves_tokens(node: Operand) -> bool:
    """Whether a call is known for doing more to its first argument than keeping each token in its place."""
    return any(function_name(node) in names for names in _RULES)


def moved_tokens(joint: Joint, source: Operand, node: Operand) -> Tokens:
    """Tokens of the result of a call whose first argument is `source`."""
    name = function_name(node)
    rule = next((rule for names, rule in _RULES.items() if name in names), keep_tokens)
    return rule(joint, source, node)


def restored_tokens(site: AttentionSite, joint: Joint) -> Tokens:
    """Tokens of `site.node` where those of the attention's result `[B, H, Sq, D]` are `joint`."""
    q, v = fake_tensor(site.q), fake_tensor(site.v)
    if site.declined is not None or q is None or v is None or not q.dim() == v.dim() == 4:
        return Lost(site.node)
    result = planned_result(ops.allocate_outputs(q, v, heads_last=True, return_lse=False)[0])

    def follow(operand: Any) -> Tokens:
        if operand is result:
            return joint
        source = next((x for x in operand.all_input_nodes if isinstance(x, PlannedNode)), None)
        if source is None:
            return Lost(site.node)
        tokens = follow(source)
        return moved_tokens(tokens, source, operand) if isinstance(tokens, Joint) else tokens

    return follow(site.restore(result))


def keep_tokens(joint: Joint, source: Operand, node: Operand) -> Tokens:
    """Each token stays in its place, even if other dimensions come or go."""
    before, after = fake_tensor(source), fake_tensor(node)
    assert before is not None
    assert after is not None
    behind = before.dim() - joint.dim
    same_rank = before.dim() == after.dim()
    if same_rank and statically_known_true(before.shape[joint.dim] == after.shape[joint.dim]):
        return joint
    if not same_rank and _equal(before.shape[: joint.dim + 1], after.shape[: joint.dim + 1]):
        return joint
    if not same_rank and _equal(before.shape[joint.dim :], after.shape[-behind:]):
        return replace(joint, dim=after.dim() - behind)
    return Lost(node)


def _view(joint: Joint, source: Operand, node: Operand) -> Tokens:
    before, after = fake_tensor(source), fake_tensor(node)
    assert before is not None
    assert after is not None
    outer = math.prod(before.shape[: joint.dim])
    for dim, size in enumerate(after.shape):
        if not statically_known_true(math.prod(after.shape[:dim]) == outer):
            continue
        # Dimensions that follow the tokens may be folded into theirs: each becomes several.
        factor: Size = 1
        for folded in range(joint.dim, before.dim()):
            if folded > joint.dim:
                factor = multiply(factor, size_of(source, folded))
            if statically_known_true(size == math.prod(before.shape[joint.dim : folded + 1])):
                return replace(scale(joint, factor), dim=dim)
    return Lost(node)


def _permute(joint: Joint, source: Operand, node: Operand) -> Tokens:
    if function_name(node) == "getattr" and node.args[1] not in ("T", "mT", "H", "mH"):
        return keep_tokens(joint, source, node)
    permutation = permutation_of(node)
    return Lost(node) if permutation is None else replace(joint, dim=permutation.index(joint.dim))


def _select(joint: Joint, source: Operand, node: Operand) -> Tokens:
    """One element of a dimension."""
    value, dim = fake_tensor(source), argument(node, 1, "dim", None)
    if value is None or not isinstance(dim, int) or dim % value.dim() == joint.dim:
        return Lost(node)
    return replace(joint, dim=joint.dim - (joint.dim > dim % value.dim()))


def _narrow(joint: Joint, source: Operand, node: Operand) -> Tokens:
    """Some neighbours along a dimension."""
    value, dim, start = fake_tensor(source), argument(node, 1, "dim", None), argument(node, 2, "start", None)
    if value is None or not isinstance(dim, int):
        return Lost(node)
    if dim % value.dim() != joint.dim:
        return joint
    first = _from_front(start, size_of(source, joint.dim))
    return Lost(node) if first is None else slice_tokens(joint, first, add(first, size_of(node, joint.dim)), node)


def _pad(joint: Joint, source: Operand, node: Operand) -> Tokens:
    """Padding of other dimensions than the tokens'."""
    value, widths = fake_tensor(source), argument(node, 1, "pad", ())
    assert value is not None
    behind = 2 * (value.dim() - 1 - joint.dim)
    untouched = all(width == 0 for width in widths[behind : behind + 2])
    return joint if untouched else Lost(node)


def _lose(joint: Joint, source: Operand, node: Operand) -> Tokens:
    return Lost(node)


def _subscript(joint: Joint, source: Operand, node: Operand) -> Tokens:
    part = subscripted(node, source, joint.dim)
    return Lost(node) if part is None else slice_tokens(replace(joint, dim=part.dim), part.start, part.end, node)


class Part(NamedTuple):
    """Elements `start` to `end` of a dimension, which became dimension `dim` of the result."""

    dim: int
    start: Size
    end: Size


def subscripted(node: Operand, source: Operand, dim: int) -> Part | None:
    """What `source[index]` takes of one dimension; None if those are no neighbours."""
    items = expand_index(node.args[1], fake_tensor(source))
    if gathers(items):
        return None
    place = [place for place, item in enumerate(items) if item is not None][dim]
    bounds = slice_bounds(items[place], size_of(source, dim))
    new_dim = sum(item is None or isinstance(item, slice) for item in items[:place])
    return None if bounds is None else Part(new_dim, *bounds)


def split_part(node: Operand, parent: Operand, index: int, dim: int) -> Part:
    """What the result with that index holds of the dimension that was split."""
    start: Size = 0
    for earlier in range(index):
        start = add(start, size_of(plan(operator.getitem, parent, earlier), dim))
    return Part(dim, start, add(start, size_of(node, dim)))


def slice_tokens(joint: Joint, start: Size, end: Size, node: Operand) -> Tokens:
    """Tokens `start` to `end`."""
    segments = cut(joint.segments, start, end)
    return Lost(node) if segments is None else join(joint.dim, segments, joint.cat)


def expand_index(index: Any, value: torch.Tensor | None) -> list[Any]:
    """The index of a tensor with an item for each of its dimensions, apart from the new ones (None)."""
    items = list(index) if isinstance(index, tuple) else [index]
    missing = (0 if value is None else value.dim()) - sum(item is not None and item is not Ellipsis for item in items)
    place = items.index(Ellipsis) if Ellipsis in items else len(items)
    return [*items[:place], *[slice(None)] * missing, *items[place + 1 :]]


def gathers(items: Sequence[Any]) -> bool:
    """Whether an index picks elements by a tensor or a list, in any order."""
    return any(isinstance(item, list) or fake_tensor(item) is not None for item in items)


def slice_bounds(item: Any, total: Size) -> tuple[Size, Size] | None:
    """Start and end of a slice that takes every element, counted from the front; None if they cannot be told."""
    if not isinstance(item, slice) or item.step not in (None, 1):
        return None
    start = 0 if item.start is None else _from_front(item.start, total)
    end = total if item.stop is None else _from_front(item.stop, total)
    return None if start is None or end is None else (start, end)


def _from_front(bound: Any, total: Size) -> Size | None:
    """A bound that may count from the end, counted from the front."""
    value = fake_value(bound) if isinstance(bound, fx.Node | PlannedNode) else bound
    if not isinstance(value, int | torch.SymInt):
        return None
    position: Size = bound
    if at_most(0, position):
        return position
    return add(total, position) if at_most(position, -1) else None


def _equal(left: Sequence[int | torch.SymInt], right: Sequence[int | torch.SymInt]) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


_RULES: dict[tuple[str, ...], Callable[[Joint, Operand, Operand], Tokens]] = {
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"): _view,
    ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "getattr", "adjoint"): _permute,
    ("getitem",): _subscript,
    ("select",): _select,
    ("narrow",): _narrow,
    ("pad",): _pad,
    (
        "flip", "fliplr", "flipud", "roll", "rot90", "gather", "index_select", "take", "take_along_dim",
        "masked_select", "sort", "msort", "topk", "channel_shuffle", "native_channel_shuffle", "pixel_shuffle",
        "pixel_unshuffle", "as_strided", "unfold", "fold",
    ): _lose,
}  # fmt: skip
