"""Under which conditions a benchmark on a GPU was run, and the file that says so beside what was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """`LITE_COMMIT`, which a machine without git is told; else the one checked out, with a "+" if files differ."""
    if told := os.environ.get("LITE_COMMIT"):
        return told
    run = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--exclude", "*", "--dirty=+"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "unknown"


def conditions() -> dict[str, Any]:
    """The device and the versions."""
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what was measured, and under which conditions."""
    path.write_text(json.dumps({**conditions(), "rows": rows}, indent=1) + "\n")
