"""`normalize_rotate_kernel` in Triton's interpreter, beside the op's specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lite_compile.kernels.rotary_triton import normalize_rotate_kernel, plan_launch
from lite_compile.rotary_op import normalize_rotate_cpu

EPS = 1e-6
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
"""Of the largest number, which is about 8: an ulp of float16 there is 2^-8 / 2."""


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_rotates(
    x: Tensor, weight: Tensor | None, per_head: bool, cos: Tensor, sin: Tensor, eps: float = EPS
) -> Tensor:
    """The kernel fills exactly the `[B, S, H, D]` it is given, with what the specification says."""
    memory = torch.full((x.numel() + 128,), math.nan, dtype=x.dtype)
    out = memory[64:-64].view(x.shape)
    grid, arguments, constants = plan_launch(x, weight, eps, per_head, cos, sin, out)
    normalize_rotate_kernel[grid](*arguments, **constants)
    expected = normalize_rotate_cpu(x, weight, eps, per_head, cos, sin)
    bound = TOLERANCE[x.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(out, expected, rtol=0, atol=bound)
    assert memory[:64].isnan().all()
    assert memory[-64:].isnan().all()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 12])
@pytest.mark.parametrize("dim", [2, 6, 64, 96, 128])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
def test_shapes(heads: int, dim: int, per_head: bool, per_pair: bool, dtype: torch.dtype) -> None:
    x = noise(0, 2, 3, heads, dim).to(dtype)
    weight = noise(1, dim if per_head else heads * dim).to(dtype)
    cos, sin = (noise(seed, 1, 3, 1, dim // 2 if per_pair else dim) for seed in (2, 3))
    assert_rotates(x, weight, per_head, cos, sin)


@pytest.mark.parametrize("batch", [1, 2])
def test_each_entry_of_a_batch_has_its_tables(batch: int) -> None:
    x, weight = noise(0, 2, 5, 3, 8), noise(1, 24)
    assert_rotates(x, weight, False, noise(2, batch, 5, 1, 8), noise(3, 2, 5, 1, 8))
    assert_rotates(x, weight, False, noise(2, 2, 5, 1, 8), noise(3, batch, 5, 1, 8))


def test_tables_that_are_views() -> None:
    x, weight = noise(0, 2, 5, 3, 8), noise(1, 24)
    table = noise(2, 1, 5, 1, 8)
    assert_rotates(x, weight, False, table[..., 0::2], table[..., 1::2])
    wide = noise(3, 2, 9, 2, 16)
    assert_rotates(x, weight, False, wide[:, 2:7, :1, 3:11], wide[:, 4:, 1:, :8])
    assert_rotates(x, weight, False, noise(4, 1, 8, 1, 5).mT.reshape(1, 5, 1, 8), noise(5, 1, 8, 5).mT.unsqueeze(2))
    assert_rotates(x, weight, False, noise(6, 1, 1, 1, 8).expand(2, 5, 1, 8), noise(7, 1, 5, 1, 1).expand(2, 5, 1, 4)
                   .repeat_interleave(2, -1))  # fmt: skip


@pytest.mark.parametrize("per_head", [False, True])
def test_rows_of_a_fused_projection(per_head: bool) -> None:
    qkv = noise(0, 2, 5, 3 * 24).half()
    weight, cos, sin = noise(1, 8 if per_head else 24).half(), noise(2, 1, 5, 1, 8), noise(3, 1, 5, 1, 8)
    for part in qkv.chunk(3, -1):
        x = part.unflatten(-1, (3, 8))
        strided = assert_rotates(x, weight, per_head, cos, sin)
        assert torch.equal(strided, assert_rotates(x.contiguous(), weight, per_head, cos, sin))
    x = qkv.transpose(0, 1)[..., :24].unflatten(-1, (3, 8))  # tokens and batch exchanged
    assert_rotates(x, weight, per_head, noise(4, 1, 2, 1, 8), noise(5, 5, 2, 1, 8))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_a_weight_and_with_another_epsilon(dtype: torch.dtype) -> None:
    x, cos, sin = noise(0, 1, 5, 3, 6).to(dtype), noise(1, 1, 5, 1, 6), noise(2, 1, 5, 1, 6)
    assert_rotates(x, None, False, cos, sin)
    assert_rotates(x, None, True, cos, sin)
    assert_rotates(x, noise(3, 18).to(dtype), False, cos, sin, eps=0.5)


def test_zeros_and_padding_have_no_share_in_the_mean() -> None:
    x, cos, sin = torch.zeros(1, 2, 3, 6), torch.ones(1, 2, 1, 6), torch.zeros(1, 2, 1, 6)
    x[0, 1] = 2.0
    out = assert_rotates(x, None, False, cos, sin)
    assert not out[0, 0].any()
    torch.testing.assert_close(out[0, 1], torch.ones(3, 6))


def test_the_norm_is_rounded_before_it_is_rotated() -> None:
    """As two kernels would: the products are those of numbers in x's dtype."""
    x, cos, sin = noise(0, 1, 7, 1, 2).half(), torch.full((1, 7, 1, 2), 1024.0), torch.zeros(1, 7, 1, 2)
    out = assert_rotates(x, None, True, cos, sin)
    assert torch.equal(out, torch.rms_norm(x, (2,), None, EPS) * 1024)
