"""Report what was decided about each attention site, as data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..decisions import GraphReport, SiteReport
from .decide_attention import Decline, Rewrite
from .graph_inputs import fake_tensor
from .token_roles import size_value


def report_attention(decisions: Sequence[Rewrite | Decline], clock: str) -> GraphReport:
    """The decisions of one graph, free of graph nodes. `clock` says where the step clock reads."""
    return GraphReport(tuple(map(_report_site, decisions)), clock)


def _report_site(decision: Rewrite | Decline) -> SiteReport:
    site = decision.site
    q, k = fake_tensor(site.q), fake_tensor(site.k)
    shapes = [() if x is None else tuple(map(_readable, x.shape)) for x in (q, k)]
    dtype = "" if q is None else str(q.dtype).removeprefix("torch.")
    if isinstance(decision, Rewrite):
        ranges, found = decision.protection
        protected = tuple((_readable(size_value(start)), _readable(size_value(end))) for start, end in ranges)
        kernel = decision.kernel.name
        return SiteReport(site.layer, True, None, "", shapes[0], shapes[1], dtype, kernel, protected, found)
    return SiteReport(site.layer, False, decision.reason, decision.detail, shapes[0], shapes[1], dtype, "dense")


def _readable(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)
