"""lite-compile: temporal sparse attention for diffusion transformers, as a `torch.compile` backend."""

from __future__ import annotations

from .backend import liteattention
from .control import generation, reset
from .errors import OptionTypeError, OptionValueError, UnsupportedAttentionError
from .explain import explain
from .options import Options
from .report import Reason, Report, SiteReport, clear_report, report
from .stats import Stats, StreamStats, stats

__all__ = [
    "OptionTypeError",
    "OptionValueError",
    "Options",
    "Reason",
    "Report",
    "SiteReport",
    "Stats",
    "StreamStats",
    "UnsupportedAttentionError",
    "clear_report",
    "explain",
    "generation",
    "liteattention",
    "report",
    "reset",
    "stats",
]
