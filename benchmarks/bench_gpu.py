"""Time of one attention call on a GPU: our kernels at several skipped shares, and what else there is.

Each result is proved right against float64 before it is timed. `python benchmarks/bench_gpu.py [--json FILE]`, or
`make bench`. "sustained" is the median of back-to-back launches, which is what a video run sees: the card is limited by
its power then. "cold" is one launch after a pause.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from conditions import save
from skip_patterns import PATTERNS, Shape, impose
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

from lite_compile.attention_bench import EPOCH, MARKS_NOTHING, sustained
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.ops import NOW_EPOCH, NOW_GENERATION, NOW_WORDS
from lite_compile.skip_state import TileShape

SHAPES: list[Shape] = [
    (1, 12, 32760, 128),
    (1, 40, 32760, 128),
    (1, 4, 75600, 128),
    (1, 24, 17408, 64),
    (2, 16, 4096, 64),
]
SHARES = (0.21, 0.42, 0.57, 0.77, 0.9)
FLEX_TILE = TileShape(128, 128)
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
SPARSE, EIGHT_BITS = ("hopper", "triton", "flex"), ("hopper-int8", "hopper-fp8")
ERRORS = {"hopper-int8": 4e-2, "hopper-fp8": 1e-1}
"""Largest relative error where it is not that of bfloat16."""
BFLOAT16_ERROR = 6e-3


class Problem:
    """Random q, k, v in bf16, laid out `[B, S, H, D]` in memory as diffusers does."""

    def __init__(self, shape: Shape, device: str = "cuda") -> None:
        batch, heads, length, dim = shape
        self.shape, self.device, self.scale = shape, device, dim**-0.5
        self.q, self.k, self.v = (
            torch.randn(batch, length, heads, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        self.now = torch.zeros(NOW_WORDS, dtype=torch.int32, device=device)
        self.now[NOW_EPOCH] = self.now[NOW_GENERATION] = EPOCH
        self.threshold = torch.tensor(MARKS_NOTHING, device=device)
        self.flops = 4 * batch * heads * length**2 * dim
        # A generation runs for long, so that short calls are timed often.
        self.repeats = min(400, max(40, int(4e14 / self.flops)))

    def sdpa(self, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(self.q, self.k, self.v)

    def ours(self, kernel: Kernel, state: Tensor) -> Tensor:
        """One call that uses and records the state; random inputs mark nothing at this threshold."""
        attend = torch.ops.lite_compile.attend
        given = (self.q, self.k, self.v, state, self.now, self.scale, self.threshold, *kernel.tile)
        out: Tensor = attend(*given, kernel_name=kernel.name)[0]
        return out

    def error(self, out: Tensor, mask: Tensor | None, tile: TileShape) -> float:
        """Largest relative error of the first and last rows of tiles against float64 over the kept tiles."""
        worst = 0.0
        length = self.shape[2]
        for batch, head, start in ((0, 0, 0), (-1, -1, (length - 1) // tile.q * tile.q)):
            rows = slice(start, min(start + tile.q, length))
            scores = self.q[batch, head, rows].double() @ self.k[batch, head].double().T * self.scale
            if mask is not None:
                dropped = mask[batch, head, start // tile.q].repeat_interleave(tile.k)[:length]
                scores = scores.masked_fill(dropped, -math.inf)
            expected = scores.softmax(-1) @ self.v[batch, head].double()
            worst = max(worst, float((out[batch, head, rows].double() - expected).norm() / expected.norm()))
        return worst

    def flex(self, mask: Tensor) -> Callable[[], Tensor]:
        """FlexAttention over the blocks that `mask` keeps."""
        kept = (~mask).int()
        number, index = kept.sum(-1, dtype=torch.int32), kept.argsort(dim=-1, descending=True, stable=True).int()
        none = torch.zeros_like(number), torch.zeros_like(index)
        lengths = (self.shape[2], self.shape[2])
        # The blocks per key, of which there may be millions, are for gradients.
        blocks = BlockMask.from_kv_blocks(
            *none, number, index, BLOCK_SIZE=tuple(FLEX_TILE), seq_lengths=lengths, compute_q_blocks=False
        )
        compiled: Any = _flex_attention()
        return lambda: compiled(self.q, self.k, self.v, block_mask=blocks)


def _flex_attention() -> Callable[..., Tensor]:
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=False))
    return _compiled[0]


_compiled: list[Callable[..., Tensor]] = []


def cold(call: Callable[[], object]) -> float:
    """Median milliseconds of single launches after 60 ms of nothing."""
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        time.sleep(0.06)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def cases() -> Iterator[tuple[str, str, float]]:
    """`(kernel, pattern, share)` of what is timed; with nothing skipped all patterns are the same."""
    yield from ((name, "", 0.0) for name in DENSE)
    yield from ((name, "scattered", 0.0) for name in (*SPARSE, *EIGHT_BITS))
    yield from ((name, pattern, share) for name in SPARSE for pattern in PATTERNS for share in SHARES)


def our_kernels(head_dim: int, device: str) -> dict[str, Kernel | str]:
    """Each of our kernels, or why this device has it not."""
    parts = {name: name.partition("-") for name in (*SPARSE, *EIGHT_BITS) if name != "flex"}
    return {
        name: select_kernel(torch.device(device), torch.bfloat16, head_dim, base, qk_dtype or None)
        for name, (base, _, qk_dtype) in parts.items()
    }


def prepare(
    problem: Problem, kernel: Kernel | None, name: str, pattern: str, share: float
) -> tuple[Callable[[], Tensor], Tensor | None, TileShape]:
    """`(call, mask, tile)` of one case; the mask is None if the kernel is given none. `kernel`: if it is ours."""
    if name in DENSE:
        return partial(problem.sdpa, DENSE[name]), None, FLEX_TILE
    if kernel is None:
        _, mask = impose(problem.shape, FLEX_TILE, pattern, share, problem.device)
        return problem.flex(mask), mask, FLEX_TILE
    state, mask = impose(problem.shape, kernel.tile, pattern, share, problem.device)
    return partial(problem.ours, kernel, state), mask, kernel.tile


def measure(shape: Shape, progress: tqdm[Any], device: str = "cuda") -> Iterator[dict[str, Any]]:
    """One row per case, cuDNN's first. Raises `AssertionError` where a result is wrong."""
    problem, kernels = Problem(shape, device), our_kernels(shape[3], device)
    for name, kernel in kernels.items():
        if isinstance(kernel, str):
            progress.write(f"{name}: {kernel}")
    dense_ms = math.nan
    for name, pattern, share in cases():
        progress.update()
        kernel = kernels.get(name)
        if isinstance(kernel, str):
            continue
        call, mask, tile = prepare(problem, kernel, name, pattern, share)
        error, limit = problem.error(call(), mask, tile), ERRORS.get(name, BFLOAT16_ERROR)
        assert error < limit, f"{name} {shape} {pattern} {share}: relative error {error}, allowed {limit}"
        ms = sustained(call, problem.repeats)
        skipped = 0.0 if mask is None else float(mask.float().mean())
        dense_ms = ms if name == "cudnn" else dense_ms
        yield {
            "shape": shape, "kernel": name, "pattern": pattern, "skipped": skipped, "error": error, "ms": ms,
            "cold_ms": cold(call), "effective_tflops": problem.flops * (1 - skipped) / ms / 1e9,
            "speed_up": dense_ms / ms, "of_ideal": ms / (1 - skipped) / dense_ms,
        }  # fmt: skip


def require_gpu() -> None:
    """Exit with a message where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU; `make bench-cpu` is for CPUs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--shape", type=int, nargs="+", default=range(len(SHAPES)), help=f"indices into {SHAPES}")
    arguments = parser.parse_args()
    require_gpu()
    shapes = [SHAPES[number] for number in arguments.shape]
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print(
        f"{'shape':>17} {'kernel':>11} {'pattern':>16} {'skipped':>8} {'ms':>8} {'cold':>8} {'TF eff.':>8} "
        f"{'/ cuDNN':>8} {'/ ideal':>8} {'error':>8}"
    )
    with tqdm(total=len(shapes) * len(list(cases())), disable=None, leave=False) as progress:
        for shape in shapes:
            for row in measure(shape, progress):
                rows.append(row)
                progress.write(
                    f"{'x'.join(map(str, shape)):>17} {row['kernel']:>11} {row['pattern']:>16} {row['skipped']:8.3f} "
                    f"{row['ms']:8.3f} {row['cold_ms']:8.3f} {row['effective_tflops']:8.0f} {row['speed_up']:8.2f} "
                    f"{row['of_ideal']:8.3f} {row['error']:8.1e}"
                )
                if arguments.json:  # after each row, so that a run that is cut short leaves what it measured
                    save(arguments.json, rows)


if __name__ == "__main__":
    main()
