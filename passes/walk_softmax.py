"""Walk from a softmax up to the product that makes the scores, and down to the product that uses the weights."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..decisions import Reason
from .attention_site import Declined
from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan
from .pointwise_steps import (
    Hiding,
    addition_of,
    batch_view_of,
    bias_that_hides,
    cast_of,
    dropout_of,
    hiding_of,
    is_number,
    is_zero,
    masking_of,
    same_shape,
    scale_of,
    symbol_or_self,
)
from .trace_product import Product, as_product

_FARTHEST = 16
_FACTORIES = {torch.empty, torch.zeros, torch.zeros_like, "new_zeros", "new_empty"}


@dataclass
class Scores:
    """What lies between a product and the softmax."""

    product: Product
    scale: Any
    """Factor of the product; a node if it is computed."""
    passed: list[fx.Node]
    terms: list[fx.Node]
    """Tensors of nothing that were added."""
    viewed: bool
    declined: Declined | None
    mask: Operand | None
    """What else was added to the scores, scaled like them."""


@dataclass
class Weights:
    """What lies between the softmax and a product."""

    product: Product
    node: fx.Node
    """The operand of the product."""
    dropout_p: Any
    passed: list[fx.Node]
    viewed: bool
    declined: Declined | None


@dataclass
class _Walk:
    """Notes on the way up."""

    scale: Any = 1.0
    passed: list[fx.Node] = field(default_factory=list)
    terms: list[fx.Node] = field(default_factory=list)
    viewed: bool = False
    declined: Declined | None = None
    masks: list[Operand | Hiding] = field(default_factory=list)
    """The last first: what is added, in the scale of the softmax's argument, and what is put in place of scores."""

    def decline(self, reason: Reason, detail: str) -> None:
        self.declined = self.declined or Declined(reason, detail)

    def multiply(self, factor: Any, node: fx.Node) -> None:
        if not isinstance(self.scale, fx.Node):
            self.scale = factor if isinstance(factor, fx.Node) else self.scale * factor
        fake = fake_tensor(factor)
        if fake is not None and any(size != 1 for size in fake.shape):
            self.decline(Reason.VARIANT, f"{node.name} multiplies the scores by a tensor")

    def add(self, term: Any, node: fx.Node, factor: Any = 1.0) -> None:
        """`node` adds `factor * term`."""
        if is_zero(term):
            if isinstance(term, fx.Node) and term.target in _FACTORIES:
                self.terms.append(term)
            return
        fake = fake_tensor(term)
        if fake is None or fake.dtype is torch.bool or not is_number(self.scale) or not is_number(factor):
            self.decline(Reason.MASK, f"{node.name} adds to the scores")
            return
        factor *= self.scale
        self.masks.append(term if factor == 1 else plan(operator.mul, plan("to", term, torch.float32), factor))

    def hide(self, node: fx.Node, scores: fx.Node) -> None:
        """`node` puts something in place of some scores."""
        hiding = hiding_of(node, scores, self.scale)
        if hiding is None:
            self.decline(Reason.MASK, f"{node.name} masks the scores")
        else:
            self.masks.append(hiding)

    def bias(self) -> Operand | None:
        """All that masks the scores, as what would be added to them."""
        bias: Operand | None = None
        finite: set[float] = set()
        for mask in reversed(self.masks):
            if isinstance(mask, Hiding):
                finite |= {mask.filler} - {-math.inf}
                bias = bias_that_hides(mask.where, mask.filler, bias)
            elif finite:
                self.decline(Reason.MASK, "something is added to what takes the place of scores")
            else:
                bias = mask if bias is None else plan(operator.add, bias, mask)
        if len(finite) > 1:
            self.decline(Reason.MASK, "scores are hidden by different numbers")
        return bias


def walk_up(softmax: fx.Node) -> Scores | None:
    """The product whose scaled result `softmax` takes, or None if there is none."""
    walk = _Walk()
    current = softmax.args[0] if softmax.args else softmax.kwargs.get("input")
    for _ in range(_FARTHEST):
        if not isinstance(current, fx.Node):
            return None
        if len(current.users) > 1:
            walk.decline(Reason.SHARED, f"{current.name} has another use")
        walk.passed.append(current)
        product = as_product(current)
        if product is not None:
            if product.added is not None:
                walk.add(product.added, current, product.beta)
            elif current.args[0] is not product.left and isinstance(current.args[0], fx.Node):
                walk.terms += [current.args[0]] if current.args[0].target in _FACTORIES else []
            walk.multiply(symbol_or_self(product.alpha), current)
            bias = walk.bias()
            return Scores(product, walk.scale, walk.passed, walk.terms, walk.viewed, walk.declined, bias)
        current = _step_up(current, walk)
    return None


def _step_up(node: fx.Node, walk: _Walk) -> fx.Node | None:
    """The input of `node` that scores come from; what `node` does to them is noted."""
    if (source := batch_view_of(node)) is not None:
        walk.viewed = True
        return source
    if (source := cast_of(node)) is not None:
        return source
    if (scaled := scale_of(node, in_place=True)) is not None:
        source, factor = scaled
        if not same_shape(source, node) and isinstance(factor, fx.Node):
            source, factor = factor, source
        walk.multiply(factor, node)
    elif (terms := addition_of(node, in_place=True)) is not None:
        source, other = terms
        if is_zero(source) and isinstance(other, fx.Node):
            source, other = other, source
        walk.add(other, node)
    elif (source := masking_of(node)) is not None:
        walk.hide(node, source)
    else:
        source = next((x for x in node.all_input_nodes if same_shape(x, node)), None)
        walk.decline(Reason.VARIANT, f"{node.name} changes the scores")
    return source if source is not None and same_shape(source, node) else None


def walk_down(softmax: fx.Node) -> Weights | None:
    """The product that uses the weights `softmax` gives, or None if there is none."""
    for user in softmax.users:
        found = _step_down(softmax, user, _FARTHEST)
        if found is not None:
            if len(softmax.users) > 1:
                found.declined = found.declined or Declined(Reason.SHARED, f"{softmax.name} has another use")
            return found
    return None


def _step_down(node: fx.Node, user: fx.Node, steps: int) -> Weights | None:
    product = as_product(user)
    if product is not None:
        declined = None
        if product.added is not None or product.alpha != 1:
            declined = Declined(Reason.VARIANT, f"{user.name} adds to the result or scales it")
        return Weights(product, node, 0.0, [], False, declined)
    dropout, view = dropout_of(user), batch_view_of(user)
    if steps == 0 or node not in ((dropout or (None,))[0], view, cast_of(user)):
        return None
    for following in user.users:
        found = _step_down(user, following, steps - 1)
        if found is None:
            continue
        found.passed.append(user)
        found.viewed = found.viewed or view is node
        if dropout is not None and found.dropout_p == 0:
            found.dropout_p = dropout[1]
        if len(user.users) > 1:
            found.declined = found.declined or Declined(Reason.SHARED, f"{user.name} has another use")
        return found
    return None
