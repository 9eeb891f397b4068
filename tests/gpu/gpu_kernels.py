"""The kernels that the tests on a GPU go through."""

from __future__ import annotations

import pytest
import torch

from lite_compile.kernels.select_kernel import HOPPER

KERNELS = [
    "triton",
    pytest.param(
        "hopper",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER, reason="needs a Hopper GPU"
        ),
    ),
]
