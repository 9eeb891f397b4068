"""`layer_norm_triton` in Triton's interpreter, against the ops on the CPU, which are its specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lite_compile.kernels.layer_norm_triton import add_normalize_kernel, plan_launch
from lite_compile.layer_norm_op import add_normalize_cpu, normalize_cpu

FP16, FP32 = torch.float16, torch.float32
EPS = 1e-6


def noise(seed: int, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def launch(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, eps: float = EPS,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Into memory that is not a number, between walls that must stay."""
    walls = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype)
    total, normed = (walls.clone() for _ in range(2))
    inside = slice(32, 32 + x.numel())
    results = [None if y is None else total[inside].view(x.shape), normed[inside].view(x.shape)]
    grid, arguments, constants = plan_launch(x, y, gate, weight, bias, scale, shift, eps, *results)
    add_normalize_kernel[grid](*arguments, **constants)
    for memory in (total, normed):
        assert memory[:32].isnan().all()
        assert memory[32 + x.numel() :].isnan().all()
    assert not normed[inside].isnan().any()
    return results[0], results[1]


def check(x: Tensor, y: Tensor | None, gate: Tensor | None, *others: Tensor | None, eps: float = EPS) -> None:
    total, normed = launch(x, y, gate, *others, eps=eps)
    if y is None:
        wanted = normalize_cpu(x, *others, eps)
    else:
        expected, wanted = add_normalize_cpu(x, y, gate, *others, eps)
        assert total is not None
        assert torch.equal(total, expected)
    if x.dtype is FP32:
        torch.testing.assert_close(normed, wanted, rtol=2e-6, atol=4e-6)
    else:  # the last bit of what lies in the middle of two float16
        torch.testing.assert_close(normed, wanted, rtol=torch.finfo(x.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("modulation", [FP16, FP32], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 48, 1536])
@pytest.mark.parametrize("table_batch", [1, 2])
def test_follows_the_op_on_the_cpu(dtype: torch.dtype, modulation: torch.dtype, dim: int, table_batch: int) -> None:
    x, y = (noise(seed, 2, 3, dim, dtype=dtype) for seed in (0, 1))
    gate, scale, shift = noise(2, table_batch, 3, dim, dtype=modulation).chunk(3, 1)
    weight, bias = (noise(seed, dim, dtype=modulation) for seed in (3, 4))
    for vectors in (
        (None, None, None, None, None),
        (gate, None, None, scale, shift),
        (gate, weight, bias, None, None),
        (None, weight, None, scale, None),
        (None, None, bias, None, shift),
        (gate, weight, bias, scale, shift),
    ):
        check(x, y, *vectors)
        check(x, None, None, *vectors[1:])


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 3.0])
def test_tokens_far_from_zero_and_without_variance(eps: float) -> None:
    """A mean that is large beside the deviation; a token of equal numbers, whose norm is zero."""
    x = noise(0, 1, 4, 96) * torch.tensor([1.0, 1e-3, 1e3, 0.0])[:, None] + torch.tensor([1e3, 1.0, 0.0, 5.0])[:, None]
    _, normed = launch(x, None, None, None, None, None, None, eps=eps)
    exact = torch.layer_norm(x.double(), (96,), None, None, eps)
    torch.testing.assert_close(normed[:, 1:3].double(), exact[:, 1:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(normed[:, 0].double(), exact[:, 0], rtol=1e-3, atol=1e-3)
    assert not normed[:, 3].any()


def test_the_norm_is_of_the_rounded_sum() -> None:
    """In float16 1000 + 0.1 is 1000, and all channels but one are the same."""
    x = torch.full((1, 1, 64), 1000.0, dtype=FP16)
    y = torch.full((1, 1, 64), 0.1, dtype=FP16)
    y[..., 5] = 1.0
    total, normed = launch(x, y, None, None, None, None, None)
    assert total is not None
    assert set(total.flatten().tolist()) == {1000.0, 1001.0}
    torch.testing.assert_close(normed, torch.layer_norm(total.float(), (64,), None, None, EPS).half())


def test_vectors_lie_anywhere() -> None:
    """Slices of one table, whose batch entries are apart, and one for all batch entries."""
    x, y = (noise(seed, 3, 2, 40) for seed in (0, 1))
    table = noise(2, 3, 6, 40)
    check(x, y, table[:, 1:2], None, None, table[:1, 3:4], table[:, 5:])
    check(x, y, table[1:2, 1:2].expand(3, -1, -1), None, None, table[:, 3:4], table[2:, 5:])
