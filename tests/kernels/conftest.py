"""The figures of offline compilations are made by benchmarks/kernel_resources.py; tests of kernels check them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
