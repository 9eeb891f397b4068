"""Tests import the installed package: the repository's `kernels/` and `passes/` must not shadow other packages."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != ROOT]
