"""What `make bench` runs: its masks, its grid, and the proof that each result is right, here on a CPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_gpu
from skip_patterns import HEAVY_KEEPS, PATTERNS, impose

from lite_compile.skip_state import TileShape, row_layout, unpack_bits

ROWS, K_TILES = (2, 3, 100), 200


@pytest.mark.parametrize("share", bench_gpu.SHARES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_skip_the_share_that_is_asked_for(pattern: str, share: float) -> None:
    torch.manual_seed(0)
    mask = PATTERNS[pattern](ROWS, K_TILES, share, "cpu")
    assert mask.shape == (*ROWS, K_TILES)
    assert float(mask.float().mean()) == pytest.approx(share, abs=0.005)
    kept = (~mask).sum(-1)
    assert kept.min() >= 1
    if not pattern.startswith("unbalanced"):
        assert (kept == kept[0, 0, 0]).all()
        return
    heavy = kept == round(HEAVY_KEEPS * K_TILES)
    assert 0.05 * heavy.numel() < int(heavy.sum()) <= 0.2 * heavy.numel()
    assert (kept[~heavy] == kept[~heavy][0]).all()
    assert bool(heavy.flatten()[-int(heavy.sum()) :].all()) is (pattern == "unbalanced, late")


def test_a_band_is_around_the_diagonal() -> None:
    mask = PATTERNS["banded"]((1, 1, 10), 20, 0.75, "cpu")
    assert (~mask[0, 0, 5]).nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert (~mask[0, 0, 0]).nonzero().flatten().tolist() == [0, 1, 2, 18, 19]


def test_every_kernel_meets_every_mask_once() -> None:
    cases = list(bench_gpu.cases())
    assert len(set(cases)) == len(cases)
    for kernel in ("hopper", "triton", "flex"):
        assert (kernel, "scattered", 0.0) in cases
        assert {(p, s) for name, p, s in cases if name == kernel and s} == {
            (p, s)
            for p in ("scattered", "banded", "unbalanced", "unbalanced, late")
            for s in (0.21, 0.42, 0.57, 0.77, 0.9)
        }


def test_results_are_compared_with_the_kept_tiles_alone() -> None:
    torch.manual_seed(0)
    problem = bench_gpu.Problem((1, 2, 500, 64), "cpu")
    state, mask = impose(problem.shape, TileShape(128, 128), "scattered", 0.5, "cpu")
    layout = row_layout(mask.shape[-1])
    assert torch.equal(unpack_bits(state[0, ..., layout.mask_start :], mask.shape[-1]), mask)
    dropped = mask.repeat_interleave(128, 2)[:, :, :500].repeat_interleave(128, 3)[..., :500]
    scores = (problem.q.double() @ problem.k.double().mT * problem.scale).masked_fill(dropped, -math.inf)
    right = (scores.softmax(-1) @ problem.v.double()).bfloat16()
    assert problem.error(right, mask, TileShape(128, 128)) < bench_gpu.BFLOAT16_ERROR
    for start in (0, 499):  # it looks at the first and the last rows
        wrong = right.clone()
        wrong[:, :, start] *= 1.5
        assert problem.error(wrong, mask, TileShape(128, 128)) > bench_gpu.BFLOAT16_ERROR
    assert problem.error(right, None, TileShape(128, 128)) > bench_gpu.BFLOAT16_ERROR
    assert problem.error(problem.sdpa(SDPBackend.MATH), None, TileShape(128, 128)) < bench_gpu.BFLOAT16_ERROR


def test_flex_attention_visits_the_kept_tiles() -> None:
    torch.manual_seed(0)
    problem = bench_gpu.Problem((1, 2, 500, 64), "cpu")
    _, mask = impose(problem.shape, bench_gpu.FLEX_TILE, "scattered", 0.5, "cpu")
    with torch.no_grad():
        out = problem.flex(mask)()
    assert problem.error(out, mask, bench_gpu.FLEX_TILE) < bench_gpu.BFLOAT16_ERROR
