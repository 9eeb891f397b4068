"""lite-compile: temporal sparse attention for diffusion transformers, as a `torch.compile` backend."""

from __future__ import annotations

from .backend import liteattention
from .control import generation, reset
from .decisions import Reason, Report, SiteReport, clear_report, report
from .errors import OptionTypeError, OptionValueError, UnsupportedAttentionError
from .explanation import explain
from .layer_stats import Stats, StreamStats, stats
from .options import Options

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
