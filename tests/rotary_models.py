"""Norms with rotary embeddings in the spellings of diffusers, and what becomes of their graphs on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fused_passes import noise, run_pass
from torch import Tensor, nn

from lite_compile.passes.fuse_rotary import fuse_rotary

BATCH, TOKENS, HEADS, DIM = 2, 6, 3, 8
EPS = 1e-6
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
Spelled = Callable[[Tensor, Tensor | None, Tensor, Tensor], Any]
"""Of x, the norm's weight, cosines and sines."""


def written(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Wan does; cosines and sines of each pair stand twice."""
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(y)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(y)


def added(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As LTX and Flux do."""
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (y.float() * cos + swapped.float() * sin).to(y.dtype)


def over_tokens(rotate: Rotate) -> Spelled:
    """x is `[B, S, H * D]`, the norm is over all heads."""

    def spelled(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(F.rms_norm(x, (x.shape[-1],), weight, EPS).unflatten(2, (HEADS, -1)), cos, sin)

    return spelled


def over_heads(rotate: Rotate) -> Spelled:
    """x is `[B, S, H * D]`, the norm is over each head."""

    def spelled(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(F.rms_norm(x.unflatten(2, (HEADS, -1)), (DIM,), weight, EPS), cos, sin)

    return spelled


def as_one_head(rotate: Rotate) -> Spelled:
    """x is `[B, S, C]`, normalised and rotated as it is."""

    def spelled(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(F.rms_norm(x, (x.shape[-1],), weight, EPS), cos, sin)

    return spelled


def tables(*shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles that differ from element to element, also within a pair."""
    angles = 3 * noise(7, *shape)
    return angles.cos(), angles.sin()


def arguments(
    dtype: torch.dtype = torch.float32, batch: int = BATCH, tokens: int = TOKENS, table_batch: int = 1,
    per_head: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of `over_tokens`, or of `over_heads`."""
    x = noise(0, batch, tokens, HEADS * DIM, dtype=dtype)
    weight = noise(1, DIM if per_head else HEADS * DIM, dtype=dtype)
    return x, weight, *tables(table_batch, tokens, 1, DIM)


run_fused = functools.partial(run_pass, fuse_rotary)


def assert_same(result: Any, expected: Any) -> None:
    """float32 closely, half precision to the bit."""
    if not isinstance(expected, Tensor):
        assert len(result) == len(expected)
        for a, b in zip(result, expected, strict=True):
            assert_same(a, b)
    elif expected.dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected)
    if isinstance(expected, Tensor):
        assert result.stride() == expected.stride()


class RotaryDenoiser(nn.Module):
    """One attention of latents `[B, S, heads * dim]` with normed and rotated q and k, as Wan writes it."""

    def __init__(self, heads: int = 2, dim: int = 16, rotate: Rotate = written) -> None:
        super().__init__()
        self.heads, self.rotate = heads, rotate
        self.to_q, self.to_k, self.to_v = (nn.Linear(heads * dim, heads * dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(heads * dim, EPS) for _ in range(2))

    def forward(self, hidden_states: Tensor, timestep: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.norm_q(self.to_q(hidden_states)), self.norm_k(self.to_k(hidden_states)), self.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (self.heads, -1)) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (self.rotate(q, cos, sin), self.rotate(k, cos, sin), v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return hidden_states + attended * timestep.cos().to(attended.dtype)[:, None, None]
