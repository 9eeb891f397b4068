"""What `make bench` runs: its masks, its grid, and the proof that each result is right, here on a CPU."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_gpu
from skip_patterns import HEAVY_KEEPS, PATTERNS, impose

from lite_compile.kernels.select_kernel import select_kernel
from lite_compile.ops import NOW_EPOCH
from lite_compile.skip_state import EPOCH_WORD, TileShape, row_layout, unpack_bits

ROWS, K_TILES = (2, 3, 100), 200
OURS = ("hopper", "triton", "hopper-int8", "hopper-fp8")


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


def test_the_tiles_of_a_row_are_drawn_at_random() -> None:
    for pattern in ("scattered", "unbalanced", "unbalanced, late"):
        mask = PATTERNS[pattern]((1, 1, 400), 50, 0.77, "cpu")
        by_tile = mask.float().mean((0, 1, 2))
        assert float((by_tile - 0.77).abs().max()) < 0.1
        assert len(mask[0, 0].unique(dim=0)) > 200


@pytest.mark.parametrize("k_tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_few_tiles_keep_one(pattern: str, k_tiles: int) -> None:
    for share in (0.0, 0.5, 0.99):
        kept = (~PATTERNS[pattern]((1, 1, 7), k_tiles, share, "cpu")).sum(-1)
        assert int(kept.min()) >= 1
        assert int(kept.min()) == k_tiles or share


def test_every_kernel_meets_every_mask_once() -> None:
    cases = list(bench_gpu.cases())
    assert cases[0] == ("cudnn", "", 0.0)  # the others are divided by its time
    assert len(set(cases)) == len(cases) == 2 + 5 + 3 * 4 * 5
    for kernel in ("hopper", "triton", "flex", "hopper-int8", "hopper-fp8"):
        assert (kernel, "scattered", 0.0) in cases
    for kernel in ("hopper", "triton", "flex"):
        patterns = {(p, s) for name, p, s in cases if name == kernel and s}
        assert patterns == set(itertools.product(PATTERNS, (0.21, 0.42, 0.57, 0.77, 0.9)))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The benchmark's `main` on a CPU, whose kernel stands for "hopper", and where cuDNN takes 3 ms and all else 2."""
    times = itertools.chain([3.0], itertools.repeat(2.0))

    def take(call: Callable[[], object], repeats: int) -> float:
        call()
        return next(times)

    kernel = select_kernel(torch.device("cpu"), torch.bfloat16, 64, "auto")
    monkeypatch.setattr(bench_gpu, "our_kernels", lambda *_: dict.fromkeys(OURS, "not here") | {"hopper": kernel})
    monkeypatch.setattr(bench_gpu, "DENSE", {"cudnn": SDPBackend.MATH, "fa2": SDPBackend.FLASH_ATTENTION})
    monkeypatch.setattr(bench_gpu, "SHAPES", [(1, 1, 64, 64), (1, 2, 500, 64)])
    monkeypatch.setattr(bench_gpu, "measure", partial(bench_gpu.measure, device="cpu"))
    monkeypatch.setattr(bench_gpu, "sustained", take)
    monkeypatch.setattr(bench_gpu, "cold", lambda call: 7.0)
    monkeypatch.setattr(bench_gpu, "require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some card")
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    with torch.no_grad():
        bench_gpu.main()


def test_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used, sdpa = set(), bench_gpu.Problem.sdpa
    monkeypatch.setattr(bench_gpu.Problem, "sdpa", lambda self, backend: used.add(backend) or sdpa(self, backend))
    run(monkeypatch, "--shape", "1", "--json", str(tmp_path / "bench.json"))
    assert used == {SDPBackend.MATH, SDPBackend.FLASH_ATTENTION}
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("not here") == 3
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["device"] == "some card"
    assert {"torch", "triton", "cudnn", "python", "commit"} < written.keys()
    assert len(written["rows"]) == 2 + 1 + 20 + 1 + 20
    for row in written["rows"]:
        ms = 3.0 if row["kernel"] == "cudnn" else 2.0
        flops = 4 * 2 * 500**2 * 64 * (1 - row["skipped"])
        assert (row["ms"], row["cold_ms"], row["speed_up"]) == (ms, 7.0, 3.0 / ms)
        assert row["of_ideal"] == pytest.approx(ms / 3.0 / (1 - row["skipped"]))
        assert row["effective_tflops"] == pytest.approx(flops / ms / 1e9)
        assert 1e-4 < row["error"] < bench_gpu.BFLOAT16_ERROR


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_gpu.Problem.ours
    monkeypatch.setattr(bench_gpu.Problem, "ours", lambda *given: right(*given) * 1.01)
    with pytest.raises(AssertionError, match=r"hopper \(1, 1, 64, 64\) scattered 0.0: relative error 0.0"):
        run(monkeypatch, "--shape", "0")


def test_results_are_compared_with_the_kept_tiles_alone() -> None:
    torch.manual_seed(0)
    problem = bench_gpu.Problem((1, 2, 500, 64), "cpu")
    state, mask = impose(problem.shape, TileShape(128, 128), "scattered", 0.5, "cpu")
    layout = row_layout(mask.shape[-1])
    assert (state[0, ..., EPOCH_WORD] == problem.now[NOW_EPOCH]).all()
    assert torch.equal(unpack_bits(state[0, ..., layout.mask_start :], mask.shape[-1]), mask)
    dropped = mask.repeat_interleave(128, 2)[:, :, :500].repeat_interleave(128, 3)[..., :500]
    scores = (problem.q.double() @ problem.k.double().mT * problem.scale).masked_fill(dropped, -math.inf)
    right = (scores.softmax(-1) @ problem.v.double()).bfloat16()
    assert problem.error(right, mask, TileShape(128, 128)) < bench_gpu.BFLOAT16_ERROR
    for head, row in ((0, 0), (1, 499)):  # it looks at the first rows of the first head and the last of the last
        wrong = right.clone()
        wrong[:, head, row] *= 1.5
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
