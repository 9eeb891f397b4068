"""Tell from the labels of two products which dimension is which: batch, queries, keys, head dim."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import fx

from ..decisions import Reason
from .attention_site import Declined
from .trace_product import Labels, Product


class Roles(NamedTuple):
    """Operands, and the permutations that bring them to `[batch..., tokens, head dim]`."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    q_dims: tuple[int, ...]
    k_dims: tuple[int, ...]
    v_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    """The permutation from `[batch..., tokens, head dim]` to how the result was written."""


def label_attention(scores: Product, weighted: Product, weights: fx.Node, viewed: bool) -> Roles | Declined | None:
    """The roles of all dimensions, or None if the two products are not attention.

    Args:
        scores: the product before the softmax, which runs over its last dimension.
        weighted: the product after it, one of whose operands is `weights`.
        viewed: there are views in between, which fold or unfold the batch.
    """
    if (weighted.left is weights) == (weighted.right is weights):
        return None
    swapped = weighted.right is weights
    v = weighted.left if swapped else weighted.right
    weights_labels, v_labels = weighted.left_labels, weighted.right_labels
    if swapped:
        weights_labels, v_labels = v_labels, weights_labels

    left, right, labels = scores.left_labels, scores.right_labels, scores.labels
    key = labels[-1]
    q, k = scores.left, scores.right
    if key in left:
        q, k, left, right = k, q, right, left
    if key in left or key not in right:
        return None
    summed = (set(left) & set(right)) - set(labels)
    batch = tuple(label for label in labels if label in left and label in right)
    rows = [label for label in left if label not in right]
    if len(summed) != 1 or set(right) - set(left) != {key} or set(labels) != {*batch, *rows, key}:
        return None
    if len(rows) > 1:
        return Declined(Reason.GQA, "heads share one k") if batch else None  # else k is of no sample: a codebook
    if not rows:
        return None
    (row,), (head_dim,) = rows, summed
    if viewed and labels[-2] != row:
        return None

    if len(weights_labels) != len(labels) and not viewed:
        return None
    if viewed:  # the batch may have been folded on the way: name its dimensions anew
        row, key = "row", "key"
        mapping: dict[Hashable, Hashable] = dict(
            zip(weights_labels, (*range(len(weights_labels) - 2), row, key), strict=True)
        )
        out_batch: Labels = tuple(range(len(weights_labels) - 2))
    else:
        mapping = dict(zip(weights_labels, labels, strict=True))
        out_batch = batch
    v_labels = tuple(mapping.get(label, ("v", label)) for label in v_labels)
    out_labels = tuple(mapping.get(label, ("v", label)) for label in weighted.labels)
    v_dim = [label for label in v_labels if label not in mapping.values()]
    if len(v_dim) != 1 or set(out_labels) != {*out_batch, row, v_dim[0]} or row in v_labels or key not in v_labels:
        return None
    if set(v_labels) != {*out_batch, key, v_dim[0]}:
        return Declined(Reason.GQA, "heads share one v")
    canonical = (*out_batch, row, v_dim[0])
    first_row, first_key = rows[0], labels[-1]
    return Roles(
        q, k, v,
        tuple(map(left.index, (*batch, first_row, head_dim))),
        tuple(map(right.index, (*batch, first_key, head_dim))),
        tuple(map(v_labels.index, (*out_batch, key, v_dim[0]))),
        tuple(map(canonical.index, out_labels)),
    )  # fmt: skip
