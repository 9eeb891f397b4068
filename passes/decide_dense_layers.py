"""Decide how the layers that the `dense_layers` option names stay exact: by the dense attention, or by our kernel."""

from __future__ import annotations

from collections.abc import Sequence

from ..decisions import Reason
from ..dense_layers import DenseLayers, choose_layers
from ..kernels.select_kernel import FAST_WHEN_DENSE
from .decide_attention import Decline, Rewrite


def decide_dense_layers(
    decisions: Sequence[Rewrite | Decline], rule: DenseLayers, rewrite_all: bool = False
) -> tuple[list[Rewrite | Decline], frozenset[str]]:
    """The decisions, with those layers left dense whose kernel gains nothing; and the names of all that skip nothing.

    Args:
        rewrite_all: whether the op has to compute them, because it hides keys that the dense attention would see.
    """
    names = tuple(decision.site.layer for decision in decisions if isinstance(decision, Rewrite))
    dense = choose_layers(rule, names)

    def decide(decision: Rewrite | Decline) -> Rewrite | Decline:
        if isinstance(decision, Decline) or decision.site.layer not in dense or rewrite_all:
            return decision
        kernel = decision.kernel.name
        if kernel in FAST_WHEN_DENSE:
            return decision
        return Decline(decision.site, Reason.EXCLUDED, f"dense_layers; the {kernel} kernel would gain nothing")

    return list(map(decide, decisions)), dense
