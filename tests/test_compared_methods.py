"""The sparse attentions that benchmarks/compare_methods.py compares with: their masks, and what they compute."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

from fidelity_metrics import flicker  # noqa: E402
from match_density import DensityCurve  # noqa: E402
from radial_mask import RadialAttention, radial_scores  # noqa: E402
from sparse_video_gen import SparseVideoGen, spatial_scores, temporal_order, temporal_scores  # noqa: E402
from tile_masks import VideoLayout, keep_tiles  # noqa: E402

from lite_compile.kernels.select_kernel import Kernel  # noqa: E402
from lite_compile.skip_state import TileShape  # noqa: E402

LAYOUT, TILE = VideoLayout(8, 32), TileShape(16, 16)
KERNEL = Kernel("cpu", TILE, 0)


def frame_of(tiles: int) -> Tensor:
    return torch.arange(tiles) * TILE.q // LAYOUT.positions


@pytest.mark.parametrize("density", [0.45, 0.6, 0.9])
@pytest.mark.parametrize("scores", [radial_scores, spatial_scores, temporal_scores])
def test_masks_have_the_density_that_is_asked_for(scores: object, density: float) -> None:
    keep = keep_tiles(scores(LAYOUT, TILE), density)  # type: ignore[operator]
    assert abs(float(keep.float().mean()) - density) <= 1 / keep.numel()


def test_radial_masks_keep_each_frame_and_the_first_and_thin_out_with_the_distance() -> None:
    keep = keep_tiles(radial_scores(LAYOUT, TILE), 0.5)
    frames = frame_of(keep.shape[0])
    apart = (frames[:, None] - frames[None]).abs()
    assert keep[apart == 0].all()
    assert keep[:, frames == 0].all()
    later = frames[None].expand_as(apart) > 0
    shares = [float(keep[(apart == d) & later].float().mean()) for d in range(1, 7)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    scores = radial_scores(LAYOUT, TILE)
    inside = (frames[:, None] > 0) & (frames[None] > 0)
    assert torch.equal(torch.where(inside, scores, 0), torch.where(inside, scores, 0).T)  # time has no direction


def test_temporal_order_puts_a_position_of_all_frames_together() -> None:
    order = temporal_order(LAYOUT)
    assert torch.equal(order.sort().values, torch.arange(LAYOUT.tokens))
    assert (order.view(LAYOUT.positions, LAYOUT.frames) % LAYOUT.positions == torch.arange(32)[:, None]).all()


def test_sparse_video_gen_tells_spatial_from_temporal_heads() -> None:
    method = SparseVideoGen(LAYOUT, KERNEL, 0.4, 0, "cpu")
    token = torch.arange(LAYOUT.tokens)
    frame, position = (torch.nn.functional.one_hot(x).float() for x in (token // 32, token % 32))
    by_frame, by_position = torch.zeros(2, LAYOUT.tokens, 32).unbind()
    by_frame[:, :8] = frame
    by_position[:] = position
    q = 12 * torch.stack([by_frame, by_position])[None]
    v = torch.randn(1, 2, LAYOUT.tokens, 16, generator=torch.Generator().manual_seed(0))
    assert method.find_temporal(q, q / 12, v, 1.0).tolist() == [[False, True]]


@pytest.mark.parametrize("make", [RadialAttention, SparseVideoGen])
def test_all_tiles_are_dense_attention_and_fewer_are_counted(make: type) -> None:
    q, k, v = torch.randn(3, 1, 2, LAYOUT.tokens, 16, generator=torch.Generator().manual_seed(1)).unbind()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with make(LAYOUT, KERNEL, 1.0, 0, "cpu") as method:
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, k, v), dense)
    assert method.density() == 1
    with make(LAYOUT, KERNEL, 0.5, 1, "cpu") as method:
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, k, v), dense)  # a dense step
        method.end_step()
        sparse = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        cross = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9])
    assert not torch.allclose(sparse, dense)
    assert cross.shape == q.shape
    assert abs(method.density() - 0.75) < 0.01


@dataclass(frozen=True)
class Made:
    density: float


@pytest.mark.parametrize(
    "density_at",
    [
        lambda x: 1 - ((x + 24) / 24) ** 3,
        lambda x: 1 - 0.55 * math.exp(x / 3),  # as the criterion "max" on the trained model, about
        lambda x: 1 - 0.55 * math.exp(2 * x),  # bends near 0
    ],
)
def test_the_density_that_is_asked_for_is_found(density_at: Callable[[float], float]) -> None:
    measured: list[float] = []

    def measure(x: float) -> Made:
        measured.append(x)
        return Made(density_at(x))

    curve = DensityCurve(measure, lowest=-24.0, highest=-0.05, first=-3.0)
    for density in (0.8, 0.6):
        assert abs(curve.find(density)[1].density - density) <= 0.004
    assert len(measured) == len(set(measured)) <= 14


def test_a_density_that_cannot_be_had_gives_the_nearest() -> None:
    number, made = DensityCurve(lambda x: Made(0.8 - x / 1000), -24.0, -0.05, -4.0).find(0.9)
    assert number == pytest.approx(-24, rel=0.05)
    assert made.density == 0.8 - number / 1000
    number, made = DensityCurve(lambda x: Made(1 - 0.3 * math.exp(x)), -24.0, -0.05, -4.0).find(0.7)
    assert -0.1 < number < -0.05
    assert made.density < 0.73


def test_flicker_is_what_jumps_in_the_background() -> None:
    still = torch.full((3, 6, 8, 8), 0.1)
    still[:, :, 2:4, 2:4] = 0.9
    assert flicker(still) == pytest.approx(0, abs=1e-4)
    flickering = still.clone()
    flickering[:, 1::2, 6] += 0.02
    background = 8 * 8 - 2 * 2
    assert flicker(flickering) == pytest.approx(255 * 0.02 * 8 / background, rel=1e-4)
    drifting = still + torch.arange(6).view(1, 6, 1, 1) * 0.01
    assert flicker(drifting) == pytest.approx(0, abs=1e-4)
    moving = still.clone()
    moving[:, :, 2:4, 2:4] += 0.05 * torch.tensor([0, 1]).repeat(3).view(1, 6, 1, 1)  # a digit is no background
    assert flicker(moving) == pytest.approx(0, abs=1e-4)
