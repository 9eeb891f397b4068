"""Tests import the installed package: the repository's `kernels/` and `passes/` must not shadow other packages."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != ROOT]

# The models are tiny and the suite runs in several processes: threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each of the fresh processes would begin with a pool of compile workers as large as the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary", help="write the outcome, the device and the versions to this JSON file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = config.getoption("--summary")
    if not path:
        return
    import torch
    import triton

    outcomes = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
    failures = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    summary = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": os.environ.get("LITE_TEST_DTYPE", "float32"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("LITE_COMMIT", "unknown"),
        **outcomes,
        "failures": failures,
    }
    Path(path).write_text(json.dumps(summary, indent=2) + "\n")
