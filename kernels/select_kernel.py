"""Which kernel computes an attention site, and with what tile size."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from ..skip_state import TileShape

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name in the report, and the tile size that its skip masks have."""

    name: str
    tile: TileShape


def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel | str:
    """The kernel for `[B, H, S, head_dim]` tensors of `dtype` on `device`, or why there is none."""
    if device.type == "cpu":
        from .attend_cpu import CPU_TILE

        return Kernel("cpu", CPU_TILE)
    if device.type != "cuda":
        return f"{device.type} has no kernel; cpu and cuda do"
    if torch.version.hip is not None:
        return "ROCm has no kernel yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    from .attend_triton import triton_tile

    return Kernel("triton", triton_tile(capability, dtype, head_dim))
