"""What was decided about each attention of each compiled graph, as data that prints as a table."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch._guards import CompileContext

from .options import Options


class Reason(Enum):
    """Why an attention was left dense. The value is what the report prints."""

    EXCLUDED = "excluded by the options"
    CROSS_ATTENTION = "cross-attention"
    TEXT = "text alone"
    SHORT = "short sequence"
    LAUNCHES = "launches take longer than the work"
    MASK = "attention mask"
    CAUSAL = "causal"
    DROPOUT = "dropout"
    SCALE = "softmax scale is not a constant"
    GQA = "grouped queries"
    RANK = "not [batch, heads, tokens, head dim]"
    GRAD = "needs gradients"
    DTYPE = "dtype"
    HEAD_DIM = "head dim"
    SIZE = "size is zero or known only at run time"
    SUBCLASS = "tensor subclass"
    DEVICE = "unsupported device"
    VARIANT = "another kind of attention"
    SHARED = "scores or weights are used elsewhere"
    LAYOUT = "layout of the output"
    JOINT = "text among the tokens"
    SUBGRAPH = "inside of a sub-graph"
    NO_IDENTITY = "no parameter identifies the layer"
    NO_CLOCK = "no clock"

    @property
    def by_design(self) -> bool:
        """Whether dense is what such attention is meant to be, rather than a gap of ours."""
        return self in (Reason.EXCLUDED, Reason.CROSS_ATTENTION, Reason.TEXT, Reason.SHORT, Reason.LAUNCHES)


@dataclass(frozen=True)
class SiteReport:
    """One attention of one compiled graph."""

    layer: str
    """Name of the module it belongs to, such as `blocks.0.attn1`."""
    rewritten: bool
    reason: Reason | None
    detail: str
    """What exactly stood in the way, and what would help."""
    q_shape: tuple[int | str, ...]
    k_shape: tuple[int | str, ...]
    dtype: str
    kernel: str
    """Kernel that runs it: `cpu`, `triton`, `hopper` (`-int8`, `-fp8`), or `dense` for whatever PyTorch picks."""
    protected: tuple[tuple[int | str, int | str], ...] = ()
    """Positions (start, end) whose tiles are always computed: text in joint attention; expressions if symbolic."""
    protected_by: str = ""
    """How they were found: where text and latents are put together, or that the option says so."""

    @property
    def decision(self) -> str:
        return "rewritten" if self.rewritten else "dense"


@dataclass(frozen=True)
class GraphReport:
    """All attention of one compiled graph."""

    sites: tuple[SiteReport, ...]
    clock: str
    """Where the step clock reads latents and timestep, or why there is none."""
    options: Options | None = field(default=None, compare=False)
    """What the graph was compiled with."""

    def __str__(self) -> str:
        return str(Report((self,)))


@dataclass(frozen=True)
class Report:
    """All attention of several compiled graphs. `str(report)` is a table."""

    graphs: tuple[GraphReport, ...]

    @property
    def sites(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for site in self.sites if site.rewritten]

    @property
    def declined(self) -> list[SiteReport]:
        return [site for site in self.sites if not site.rewritten]

    def reasons(self) -> dict[Reason, int]:
        """How many sites were left dense for each reason."""
        return dict(Counter(site.reason for site in self.declined if site.reason))

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)

    def __str__(self) -> str:
        if not self.graphs:
            return "liteattention: nothing has been compiled yet"
        lines = []
        for number, graph in enumerate(self.graphs):
            done = sum(site.rewritten for site in graph.sites)
            lines.append(
                f"graph {number}: {done} of {len(graph.sites)} attention sites rewritten; clock: {graph.clock}"
            )
            rows: list[tuple[str, ...]] = [("layer", "decision", "q", "k", "dtype", "kernel", "protected", "reason")]
            for site in graph.sites:
                reason = "" if site.reason is None else site.reason.value
                if site.detail:
                    reason += f": {site.detail}"
                shapes = ["x".join(map(str, shape)) for shape in (site.q_shape, site.k_shape)]
                rows.append((site.layer, site.decision, *shapes, site.dtype, site.kernel, _protected(site), reason))
            if graph.sites:
                lines += format_table(rows if any(site.protected for site in graph.sites) else _without(rows, -2))
        return "\n".join(lines)


def _protected(site: SiteReport) -> str:
    """Such as `0:512 (cat in blocks.0.attn1)`."""
    ranges = ", ".join(f"{start}:{end}" for start, end in site.protected)
    return f"{ranges} ({site.protected_by})" if ranges else ""


def _without(rows: Sequence[tuple[str, ...]], column: int) -> list[tuple[str, ...]]:
    return [(*row[:column], *row[column + 1 :]) for row in rows]


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines, the first one being the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]]


_lock = threading.Lock()
_compiled: list[tuple[weakref.ref[CompileContext] | None, GraphReport]] = []


def record(graph: GraphReport) -> None:
    """Remember the decisions about one compiled graph; Dynamo's second attempt at a compilation replaces its first."""
    attempt = CompileContext.try_get()
    with _lock:
        last = _compiled[-1][0] if _compiled else None
        if attempt is not None and last is not None and last() is attempt:
            _compiled.pop()
        _compiled.append((None if attempt is None else weakref.ref(attempt), graph))


def report() -> Report:
    """Decisions about all graphs compiled with `backend="liteattention"` in this process so far."""
    with _lock:
        return Report(tuple(graph for _, graph in _compiled))


def clear_report() -> None:
    """Forget all recorded decisions."""
    with _lock:
        _compiled.clear()
