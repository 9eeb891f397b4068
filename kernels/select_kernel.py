"""Which kernel computes an attention site, and with what tile size."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..skip_state import TileShape

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
QK_DTYPES = ("int8", "fp8")
HOPPER = (9, 0)


@dataclass(frozen=True)
class Kernel:
    """A kernel by its name in the report, and the tile size that its skip masks have."""

    name: str
    tile: TileShape
    break_even: int
    """Tokens from which on it is faster than dense attention when 42 % of the tiles are skipped."""


BREAK_EVEN = {"cpu": 1024, "hopper": 2048, "triton": 4096}
"""Per kernel, the same at head dims 64 and 128 (benchmarks/LOG.md). `triton` was measured against cuDNN on an H100, and
is taken to be the same on other GPUs."""

FAST_WHEN_DENSE = frozenset({"hopper"})
"""Kernels that are as exact as dense attention and lose nothing to it while nothing is skipped."""


def select_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, wanted: str = "auto", qk_dtype: str | None = None
) -> Kernel | str:
    """The kernel for `[B, H, S, head_dim]` tensors of `dtype` on `device`, or why there is none.

    Args:
        wanted: name of the only kernel that may be taken, or "auto": the fastest that can be.
        qk_dtype: one of `QK_DTYPES`: what q and k are rounded to for their product, which `hopper` alone can do.
    """
    if qk_dtype is None:
        return _select(device, dtype, head_dim, wanted)
    found = _select(device, dtype, head_dim, "hopper") if wanted in ("auto", "hopper") else f"not {wanted!r}"
    if isinstance(found, Kernel):
        return replace(found, name=f"{found.name}-{qk_dtype}")
    return f"q and k in 8 bits need the kernel 'hopper': {found}"


def _select(device: torch.device, dtype: torch.dtype, head_dim: int, wanted: str) -> Kernel | str:
    if device.type == "cpu":
        from .attend_cpu import CPU_TILE

        return _missing(wanted, device, "cpu") or _kernel("cpu", CPU_TILE)
    if device.type != "cuda":
        return f"{device.type} has no kernel; cpu and cuda do"
    if torch.version.hip is not None:
        return "ROCm has no kernel yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    missing = _missing(wanted, device, "triton", "hopper")
    if missing is not None:
        return missing
    if wanted != "triton":
        obstacle = hopper_obstacle(capability, dtype, head_dim)
        if obstacle is None:
            from .hopper_pipeline import HOPPER_TILE

            return _kernel("hopper", HOPPER_TILE)
        if wanted == "hopper":
            return obstacle
    from .attend_triton import triton_tile

    return _kernel("triton", triton_tile(capability, dtype, head_dim))


def _kernel(name: str, tile: TileShape) -> Kernel:
    return Kernel(name, tile, BREAK_EVEN[name])


def hopper_obstacle(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel for Hopper cannot be used, or None if it can."""
    if capability != HOPPER:
        return f"the hopper kernel needs compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the hopper kernel takes float16 and bfloat16, not {dtype}".replace("torch.", "")
    if head_dim > 128 or head_dim % 8:
        return f"the hopper kernel takes head dims up to 128 that are multiples of 8, not {head_dim}"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "the hopper kernel needs triton 3.6 or newer"
    return None


def _missing(wanted: str, device: torch.device, *known: str) -> str | None:
    """That a device has no kernel of that name, or None if it has."""
    if wanted in ("auto", *known):
        return None
    return f"allowed on {device.type}: 'auto', {', '.join(map(repr, known))}"


@functools.cache
def cuda_kernel(name: str) -> Callable[..., None]:
    """The function that launches a kernel; raises `ValueError` if there is none of that name."""
    base, _, qk_dtype = name.partition("-")
    if base == "hopper" and qk_dtype in ("", *QK_DTYPES):
        from .attend_hopper import attend_hopper

        return functools.partial(attend_hopper, qk_dtype=qk_dtype) if qk_dtype else attend_hopper
    if name == "triton":
        from .attend_triton import attend_triton

        return attend_triton
    raise ValueError(f"kernel is {name!r}; allowed on cuda: 'hopper', 'hopper-int8', 'hopper-fp8', 'triton'")
