"""lite-compile: temporal sparse attention for diffusion transformers, as a `torch.compile` backend."""

from __future__ import annotations

from .backend import liteattention
from .control import generation, reset, set_threshold
from .decisions import Reason, Report, SiteReport, clear_report, report
from .errors import OptionTypeError, OptionValueError, UnsupportedAttentionError
from .explanation import explain
from .layer_stats import Stats, StreamStats, stats
from .options import Options
from .passes.attention_site import AttentionSite, Declined, Spelling
from .passes.planned_nodes import plan
from .passes.spelling_registry import register_spelling, unregister_spelling
from .schedule import Schedule

__all__ = [
    "AttentionSite",
    "Declined",
    "OptionTypeError",
    "OptionValueError",
    "Options",
    "Reason",
    "Report",
    "Schedule",
    "SiteReport",
    "Spelling",
    "Stats",
    "StreamStats",
    "UnsupportedAttentionError",
    "clear_report",
    "explain",
    "generation",
    "liteattention",
    "plan",
    "register_spelling",
    "report",
    "reset",
    "set_threshold",
    "stats",
    "unregister_spelling",
]
