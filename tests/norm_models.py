"""Layer norms with residuals and modulations as diffusers spells them, and what becomes of their graphs on the CPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fused_passes import noise, run_pass
from torch import Tensor

from lite_compile.passes.fuse_layer_norm import fuse_layer_norm

BATCH, TOKENS, DIM = 2, 5, 48
EPS = 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Arguments(NamedTuple):
    """Of all spellings here."""

    x: Tensor
    y: Tensor
    gate: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor


def arguments(
    dtype: torch.dtype = FP32, modulation: torch.dtype = FP32, batch: int = BATCH, table_batch: int = BATCH,
    tokens: int = TOKENS, dim: int = DIM,
) -> Arguments:  # fmt: skip
    """x has a mean and a scale of its own; gate, scale and shift are slices of one table, as in a model."""
    x, y = (noise(seed, batch, tokens, dim, dtype=dtype) for seed in (0, 1))
    gate, scale, shift = noise(2, table_batch, 3, dim, dtype=modulation).chunk(3, 1)
    return Arguments(3 * x + 2, y, gate, scale, shift, noise(3, dim, dtype=dtype), noise(4, dim, dtype=dtype))


def norm_of(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`FP32LayerNorm` of diffusers, behind a cast of the caller's."""
    vectors = (None if vector is None else vector.float() for vector in (weight, bias))
    return F.layer_norm(x.float().float(), (x.shape[-1],), *vectors, EPS)


def modulated(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Tensor:
    """Wan's first norm of a block that gets its input."""
    return (norm_of(x) * (1 + scale) + shift).type_as(x)


def gated_affine(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Wan's second norm."""
    total = (x.float() + y * gate).type_as(x)
    return total, norm_of(total, weight, bias).type_as(total)


def added_modulated(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    """Wan's third norm."""
    total = x + y
    return total, (norm_of(total) * (1 + scale) + shift).type_as(total)


def gated_modulated(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    """Wan's first norm behind the end of another block."""
    total = (x.float() + y.float() * gate).type_as(x)
    return total, (norm_of(total) * (1 + scale) + shift).type_as(total)


def narrow(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """As Flux does, in the dtype of the model."""
    total = x + gate * y
    return total, F.layer_norm(total, (x.shape[-1],), None, None, EPS) * (1 + scale) + shift


def blocks(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What an op returns is what the next one reads."""
    for _ in range(3):
        attended = (norm_of(x) * (1 + scale) + shift).type_as(x).sin()
        x = (x.float() + attended * gate).type_as(x)
        attended = norm_of(x, weight, bias).type_as(x).cos()
        x = x + attended
        fed = (norm_of(x) * (1 + shift) + gate).type_as(x).tanh()
        x = (x.float() + fed.float() * scale).type_as(x)
    return x


run_fused = functools.partial(run_pass, fuse_layer_norm)
