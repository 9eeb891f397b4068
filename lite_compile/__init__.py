"""lite-compile: temporal sparse attention for diffusion transformers, as a `torch.compile` backend."""

from __future__ import annotations

from .attention_capture import AttentionCall, capture_attention
from .backend import liteattention
from .calibration.calibrate import calibrate
from .calibration.calibration_file import CalibratedThresholds, load_calibration
from .calibration.measure_errors import measure_errors
from .calibration.result import Calibration
from .control import generation, reset, set_ranges, set_threshold
from .decisions import Reason, Report, SiteReport, clear_report, report
from .errors import OptionTypeError, OptionValueError, UnsupportedAttentionError
from .explanation import explain
from .layer_stats import Stats, StreamStats, stats
from .options import Options
from .passes.attention_site import AttentionSite, Declined, Spelling
from .passes.planned_nodes import plan
from .passes.spelling_registry import register_spelling, unregister_spelling
from .plots import plot, plot_attention
from .run_report import save_report
from .schedule import Schedule
from .step_errors import StepErrors

__all__ = [
    "AttentionCall",
    "AttentionSite",
    "CalibratedThresholds",
    "Calibration",
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
    "StepErrors",
    "StreamStats",
    "UnsupportedAttentionError",
    "calibrate",
    "capture_attention",
    "clear_report",
    "explain",
    "generation",
    "liteattention",
    "load_calibration",
    "measure_errors",
    "plan",
    "plot",
    "plot_attention",
    "register_spelling",
    "report",
    "reset",
    "save_report",
    "set_ranges",
    "set_threshold",
    "stats",
    "unregister_spelling",
]
