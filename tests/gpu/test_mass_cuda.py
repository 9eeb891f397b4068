"""The criterion "mass" on a real GPU: the bound against float64, and where nothing may be marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from gpu_kernels import KERNELS
from mass_bound import check_bound, draw_case, summarise
from models import OPTIONS, denoise, noise, prompt, tiny_wan
from torch import Tensor

import lite_compile
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TENSOR_CORE = 2.0**-21
"""Relative, of one addition: tensor cores cut off the last bits of what they add up."""


def tile_of(kernel: str, dim: int = 64) -> TileShape:
    found = select_kernel(torch.device("cuda"), torch.bfloat16, dim, kernel)
    assert isinstance(found, Kernel), found
    return found.tile


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_marked_stays_within_the_budget(kernel: str) -> None:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor, tile: TileShape,
        key_bias: Tensor | None, protected: Sequence[int],
    ) -> None:  # fmt: skip
        given = [x.cuda() for x in (q, k, v, state, now)]
        bias = None if key_bias is None else key_bias.cuda()
        torch.ops.lite_compile.attend(
            *given, scale, threshold.cuda(), *tile, True, False, bias, protected, kernel, "mass"
        )
        state.copy_(given[3])

    cases = [draw_case(seed, [tile_of(kernel)], [torch.bfloat16, torch.float16]) for seed in range(60)]
    seen = summarise([check_bound(attend, case, TENSOR_CORE) for case in cases])
    assert seen.rows >= 10_000
    assert seen.marked >= seen.rows / 4
    assert seen.tightest > 0.9
    assert seen.spent > 0.15


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_budget_skips_what_a_mask_hides_and_nothing_else(kernel: str) -> None:
    """Though weights of 2**-1000 underflow to 0."""
    tile = tile_of(kernel)
    q, k = torch.zeros(1, 1, tile.q, 64, device="cuda"), torch.zeros(1, 1, 6 * tile.k, 64, device="cuda")
    q[..., 0], k[0, 0, 2 * tile.k : 4 * tile.k, 0] = 1.0, -1000.0
    bias = torch.zeros(1, k.shape[2], device="cuda")
    bias[0, 4 * tile.k : 5 * tile.k] = -math.inf
    q, k = q.bfloat16(), k.bfloat16()
    now = torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32, device="cuda")
    for threshold, expected in ((-math.inf, [0, 0, 0, 0, 1, 0]), (-100.0, [0, 0, 1, 1, 1, 0])):
        state = torch.zeros(state_shape(1, 1, 1, tile.q, k.shape[2], tile), dtype=torch.int32, device="cuda")
        limit = torch.tensor(threshold, device="cuda")
        for _ in range(2):
            torch.ops.lite_compile.attend(
                q, k, k, state, now, 1.0, limit, *tile, key_bias=bias, kernel_name=kernel, criterion="mass"
            )
        marks = unpack_bits(state[..., row_layout(6).mask_start :], 6).flatten()
        assert marks.tolist() == list(map(bool, expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_runs_with_it(kernel: str) -> None:
    torch._dynamo.reset()
    options = {**OPTIONS, "inner": "inductor", "kernel": kernel, "criterion": "mass", "threshold": -4.0}
    model = tiny_wan().to(torch.bfloat16)
    start, prompts = noise(0).to(torch.bfloat16), [prompt(0).to(torch.bfloat16)]
    result = denoise(torch.compile(model, backend="liteattention", options=options), start, prompts, 6)
    expected = denoise(tiny_wan().to(torch.bfloat16), start, prompts, 6)
    assert lite_compile.stats(model).density < 1
    assert (result - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_queries_and_keys_in_8_bits(name: str) -> None:
    """Marks differ from those of 16 bits by no more than the rounding explains."""
    kernel = select_kernel(torch.device("cuda"), torch.bfloat16, 64, qk_dtype=name)
    if isinstance(kernel, str):
        pytest.skip(kernel)
    position = torch.linspace(0, 2 * math.pi, 1536, device="cuda")
    wave = torch.stack([f(n * position) for n in range(1, 17) for f in (torch.cos, torch.sin)], -1)
    q = k = torch.cat([wave, wave], -1).expand(1, 2, -1, -1).bfloat16()
    v, now = torch.randn_like(k), torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32, device="cuda")
    marks = []
    for kernel_name in ("hopper", kernel.name):
        state = torch.zeros(state_shape(1, 1, 2, 1536, 1536, kernel.tile), dtype=torch.int32, device="cuda")
        for _ in range(3):
            torch.ops.lite_compile.attend(
                q, k, v, state, now, 0.5, torch.tensor(-6.0, device="cuda"), *kernel.tile, kernel_name=kernel_name,
                criterion="mass",
            )  # fmt: skip
        k_tiles = tile_count(1536, kernel.tile.k)
        marks.append(unpack_bits(state[..., row_layout(k_tiles).mask_start :], k_tiles))
    assert marks[0].float().mean() > 0.1
    assert (marks[0] != marks[1]).float().mean() < 0.05
