"""`dropped_mass_triton` in Triton's interpreter, against the op on the CPU in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attend_cases import THRESHOLD, TILE, make_now, make_qkv, padding_bias
from torch import Tensor

from lite_compile.dropped_mass import dropped_mass
from lite_compile.kernels.dropped_mass_triton import dropped_mass_triton
from lite_compile.ops import attend_reference
from lite_compile.skip_state import state_shape


@pytest.mark.parametrize(
    ("q_len", "k_len", "dim", "dtype", "bias", "kv_heads"),
    [
        (1, 50, 16, torch.float32, None, 4),
        (200, 700, 64, torch.float16, None, 1),
        (70, 1100, 40, torch.float32, "infinite", 4),
        (100, 300, 32, torch.float16, "finite", 2),
    ],
)
def test_follows_the_op_on_the_cpu(
    q_len: int, k_len: int, dim: int, dtype: torch.dtype, bias: str | None, kv_heads: int
) -> None:
    q, k, v = make_qkv(2, 4, q_len, k_len, dim, dtype)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    key_bias = None if bias is None else padding_bias(bias, 2, k_len)
    state = torch.zeros(state_shape(2, 2, 4, q_len, k_len, TILE), dtype=torch.int32)
    exact: list[Tensor] = [x.double() for x in (q, k, v)]
    for step in range(3):
        now = make_now(slot=1)
        now[1] = step
        given = (state, now, dim**-0.5)
        found = dropped_mass_triton(q, k, *given, TILE, key_bias)
        expected = dropped_mass(*exact[:2], *given, TILE, key_bias)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
        assert (step > 0) or not found.any()
        attend_reference(*exact, *given, torch.tensor(-2.0), TILE, key_bias)
    assert q_len == 1 or float(found[1]) > 0
    for other in (make_now(slot=-1), make_now(slot=2), make_now(slot=0), make_now(epoch=8, slot=1)):
        assert not dropped_mass_triton(q, k, state, other, dim**-0.5, TILE, key_bias).any()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale_and_stride(scale: float) -> None:
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in make_qkv(1, 2, 100, 300, 32))
    state = torch.zeros(state_shape(1, 1, 2, 100, 300, TILE), dtype=torch.int32)
    exact = [x.double() for x in (q, k, v)]
    attend_reference(*exact, state, make_now(), scale, THRESHOLD, TILE)
    state[..., 3:] |= 5  # more than would be marked
    found = dropped_mass_triton(q, k, state, make_now(), scale, TILE)
    torch.testing.assert_close(found, dropped_mass(*exact[:2], state, make_now(), scale, TILE), rtol=1e-4, atol=0)
    assert float(found[0]) > 0


def test_rows_without_keys_drop_nothing() -> None:
    q, k, _ = make_qkv(2, 1, 64, 96, 32)
    state = torch.full(state_shape(1, 2, 1, 64, 96, TILE), -1, dtype=torch.int32)
    state[..., 0] = 7
    bias = torch.zeros(2, 96)
    bias[1] = -math.inf
    found = dropped_mass_triton(q, k, state, make_now(), 0.2, TILE, bias)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0]))
