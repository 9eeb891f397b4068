"""The op `lite_compile::advance_clock`: `clock.advance` on GPUs, where it is a few kernels of ours."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import NOW_WORDS
from .trajectory import DenseSteps

LOADED = frozenset(
    {
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64,
    }
)  # fmt: skip
"""Dtypes that the kernels read. Others are converted before."""
MAX_TIMES = 1 << 16
"""Most timesteps (one per token) that one program may look through."""

_library = torch.library.Library("lite_compile", "FRAGMENT")
_library.define(
    "advance_clock(Tensor(a!) clock, Tensor[] latents, Tensor timestep, Tensor[] conditions, int max_streams, "
    "float dense_first, float dense_last, bool count_first, bool count_last, int refresh_every) -> Tensor"
)


def advance_by_kernels(
    clock: Tensor, latents: Sequence[Tensor], timestep: Tensor, conditions: Sequence[Tensor | int | float],
    max_streams: int, dense_steps: DenseSteps, refresh_every: int,
) -> Tensor:  # fmt: skip
    """`clock.advance` on a CUDA device."""
    readable = functools.partial(_readable, device=clock.device)
    first, last = dense_steps
    now: Tensor = torch.ops.lite_compile.advance_clock(
        clock, list(map(readable, latents)), readable(timestep), list(map(readable, conditions or (0,))), max_streams,
        float(first), float(last), isinstance(first, int), isinstance(last, int), refresh_every,
    )  # fmt: skip
    return now


def _readable(x: Tensor | int | float, device: torch.device) -> Tensor:
    """`x` on the device, of a dtype that the kernels know, and as it lies in memory, but for its strides.

    These, like sizes, are looked at by the op itself: while tracing they may be unknown, or a guard each.
    """
    if not isinstance(x, Tensor):
        return torch.full((1,), x, dtype=torch.float64, device=device)
    x = x.resolve_conj().resolve_neg()
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.dtype not in LOADED:
        x = x.to(torch.float64)
    return x if x.device == device else x.to(device)


@torch.library.register_fake("lite_compile::advance_clock", lib=_library)
def _advance_fake(
    clock: Tensor, latents: list[Tensor], timestep: Tensor, conditions: list[Tensor], max_streams: int,
    dense_first: float, dense_last: float, count_first: bool, count_last: bool, refresh_every: int,
) -> Tensor:  # fmt: skip
    return clock.new_empty(NOW_WORDS)


@torch.library.impl(_library, "advance_clock", "CUDA")
def _advance_cuda(
    clock: Tensor, latents: list[Tensor], timestep: Tensor, conditions: list[Tensor], max_streams: int,
    dense_first: float, dense_last: float, count_first: bool, count_last: bool, refresh_every: int,
) -> Tensor:  # fmt: skip
    from .kernels.clock_triton import advance_triton

    steps = DenseSteps(
        int(dense_first) if count_first else dense_first, int(dense_last) if count_last else dense_last
    )  # fmt: skip
    if timestep.numel() > MAX_TIMES:
        timestep = timestep.float().amax()
    latents, conditions = ([x.contiguous() for x in given] for given in (latents, conditions))
    return advance_triton(clock, latents, timestep.contiguous(), conditions, max_streams, steps, refresh_every)
