"""Find out whether an attention mask is the same for all heads and queries: then it is a bias per key."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..decisions import Reason
from .attention_site import AttentionSite, Declined
from .graph_inputs import (
    argument_name,
    fake_tensor,
    fake_value,
    is_static,
    placeholders,
    size_hint,
    special_kind,
    storages,
)
from .planned_nodes import Operand, PlannedNode, plan
from .pointwise_steps import bias_that_hides, is_zero
from .writes import writes

_POINTWISE = {
    "to", "float", "half", "bfloat16", "double", "bool", "type", "contiguous", "clone", "detach", "expand", "repeat",
    "add", "sub", "mul", "div", "neg", "eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or",
    "masked_fill", "where", "repeat_interleave", torch.repeat_interleave,
    torch.where, torch.masked_fill, torch.logical_not, torch.logical_and, torch.logical_or,
    torch.add, torch.sub, torch.rsub, torch.mul, torch.div, torch.neg, torch.eq, torch.ne, torch.clone,
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.invert, operator.and_,
    operator.or_, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
}  # fmt: skip
"""What repeats, or computes each element from those that broadcasting aligns with it: equal slices stay equal."""
_FILLED = {
    torch.zeros, torch.ones, torch.full, torch.zeros_like, torch.ones_like, torch.full_like, "new_zeros", "new_ones",
    "new_full",
}  # fmt: skip
_OF_THE_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Methods that take no more of their second argument than its dtype, device or shape."""
_RESHAPES = {"view", "reshape", "unsqueeze", "squeeze", torch.unsqueeze, torch.squeeze, torch.reshape}
_FROM_ROWS_ON = {
    1: (None,),
    2: (slice(0, 1),),
    3: (0, slice(0, 1)),
    4: (slice(None), 0, 0),
}
"""Index that takes `[B | 1, Sk]` from a mask of so many dimensions: that of the first head and query."""


def match_key_mask(
    site: AttentionSite,
    batch: int | torch.SymInt,
    k_len: int | torch.SymInt,
    per_step: Collection[fx.Node] = (),
) -> Operand | Declined | None:
    """The float32 bias `[B | 1, Sk]` that the site's mask amounts to, None if it masks nothing, or why it is another.

    As for `scaled_dot_product_attention`, the mask is aligned with `[B, H, Sq, Sk]` from the right, True attends and
    floats are added to the scores.

    Args:
        per_step: inputs that change from step to step. A tile that is hidden at one step is skipped at the next, so a
            mask may not be made from them.
    """
    mask = site.attn_mask
    fake = fake_tensor(mask)
    if fake is None or special_kind(fake):
        return Declined(Reason.MASK, "not a plain tensor")
    if fake.dtype is not torch.bool and is_zero(mask, reader=site.node):
        return None
    if fake.dtype is not torch.bool and not fake.is_floating_point():
        return Declined(Reason.MASK, f"its dtype is {fake.dtype}")
    if fake.dim() not in _FROM_ROWS_ON or not statically_known_true(fake.shape[-1] == k_len):
        return Declined(Reason.MASK, f"its shape is {tuple(fake.shape)}")
    for dim, things in ((-2, "rows"), (-3, "heads")):
        if not _is_constant(mask, dim):
            return Declined(Reason.MASK, f"differs between {things}")
    if fake.dim() == 4 and not any(statically_known_true(fake.shape[0] == size) for size in (1, batch)):
        return Declined(Reason.MASK, f"its shape is {tuple(fake.shape)}")
    changing = next((node for node in per_step if _is_made_from(mask, node)), None)
    if changing is not None:
        return Declined(Reason.MASK, f"changes with {argument_name(changing) or changing.name!r} from step to step")
    return _key_bias(mask)


def _key_bias(mask: Operand) -> Operand:
    fake = fake_tensor(mask)
    assert fake is not None
    bias = plan(operator.getitem, mask, _FROM_ROWS_ON[fake.dim()])
    if fake.dtype is torch.bool:
        return bias_that_hides(plan("logical_not", bias))
    return bias if fake.dtype is torch.float32 else plan("to", bias, torch.float32)


def mask_inputs(bias: Operand, graph: fx.Graph) -> list[fx.Node]:
    """Inputs of the graph, other than parameters and buffers, whose values a bias is made from."""
    return [node for node in placeholders(graph) if not is_static(node) and _is_made_from(bias, node)]


def _is_constant(value: Any, dim: int) -> bool:
    """Whether all slices of `value` along `dim`, counted from the last dimension, are provably equal."""
    fake = fake_tensor(value)
    if fake is None or -dim > fake.dim():
        return True
    if statically_known_true(fake.shape[dim] == 1) or statically_known_true(fake.stride(dim) == 0):
        return True
    if value.op not in ("call_function", "call_method") or _is_written(value):
        return False
    if value.target in _FILLED:
        return True
    if value.target in _POINTWISE:
        return all(_is_constant(source, dim) for source in value.all_input_nodes)
    if value.target in _RESHAPES or _is_plain_index(value):
        source = value.args[0]
        before = _same_dimension(source, value, dim)
        return before is not None and _is_constant(source, before)
    return False


def _is_written(value: Operand) -> bool:
    """Whether something writes to a tensor or to a view of it."""
    return any(True for _ in _writers(value))


def _writers(value: Operand) -> Iterator[fx.Node]:
    """What writes to a tensor or to a view of it."""
    memory = storages(value)
    for user in () if isinstance(value, PlannedNode) else value.users:
        if writes(user):
            yield user
        elif memory & storages(user):
            yield from _writers(user)


def _is_made_from(value: Operand, source: fx.Node) -> bool:
    """Whether a tensor depends on what `source` holds, beyond its shape and dtype."""
    pending, seen = [value], {value}
    for current in pending:
        if current is source:
            return True
        operands = [*_read_by(current), *(x for writer in _writers(current) for x in writer.all_input_nodes)]
        pending += [x for x in dict.fromkeys(operands) if x not in seen]
        seen.update(operands)
    return False


def _read_by(node: Operand) -> list[Operand]:
    """Operands of a call whose elements it looks at."""
    size = fake_value(node)
    if node.target in _FILLED or (isinstance(size, int | torch.SymInt) and size_hint(size) is not None):
        return []
    return [*node.all_input_nodes][: 1 if node.target in _OF_THE_LIKE else None]


def _is_plain_index(value: Operand) -> bool:
    """Whether a tensor is indexed by `None`, `...` and `:` only."""
    if value.target is not operator.getitem or fake_tensor(value.args[0]) is None:
        return False
    index = value.args[1] if isinstance(value.args[1], tuple) else (value.args[1],)
    return all(part is None or part is ... or part == slice(None) for part in index)


def _same_dimension(source: fx.Node, result: Operand, dim: int) -> int | None:
    """Dimension of `source` that dimension `dim` of `result` is, where a view only adds or drops sizes of 1."""
    before, after = fake_tensor(source), fake_tensor(result)
    assert after is not None
    if before is None:
        return None
    kept = [[d for d in range(-x.dim(), 0) if not statically_known_true(x.shape[d] == 1)] for x in (before, after)]
    if len(kept[0]) != len(kept[1]):
        return None
    if not all(statically_known_true(before.shape[b] == after.shape[a]) for b, a in zip(*kept, strict=True)):
        return None
    return kept[0][kept[1].index(dim)]
