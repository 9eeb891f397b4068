"""From how many tokens on does a kernel pay? Short sequences, in CUDA graphs, so that Python's launches do not count.

`python benchmarks/bench_short.py [--json FILE]`: for each kernel, head dim and length cuDNN's time over ours at several
skipped shares. `BREAK_EVEN` of kernels/select_kernel.py, the rule behind `min_seq_len="auto"`, is taken from it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from bench_gpu import BFLOAT16_ERROR, Problem, require_gpu
from conditions import save
from skip_patterns import impose
from torch import Tensor
from torch.nn.attention import SDPBackend

from lite_compile.attention_bench import sustained
from lite_compile.kernels.select_kernel import Kernel, select_kernel

BATCH, HEADS = 2, 24
LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192)
HEAD_DIMS = (64, 128)
SHARES = (0.0, 0.42, 0.77)
KERNELS = ("hopper", "triton")
CALLS = 10
"""In one graph."""


def captured_ms(call: Callable[[], Tensor]) -> float:
    """Median milliseconds of one of `CALLS` calls in a CUDA graph, its replays back to back."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated at first is not to be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return sustained(graph.replay, 40) / CALLS


def measure(length: int, dim: int) -> list[dict[str, Any]]:
    """A row per kernel and skipped share; each result is proved right first."""
    shape = (BATCH, HEADS, length, dim)
    problem = Problem(shape)
    dense = captured_ms(partial(problem.sdpa, SDPBackend.CUDNN_ATTENTION))
    rows = []
    for name, share in itertools.product(KERNELS, SHARES):
        kernel = select_kernel(torch.device("cuda"), torch.bfloat16, dim, name)
        if not isinstance(kernel, Kernel):
            continue
        state, mask = impose(shape, kernel.tile, "scattered", share)
        ours = partial(problem.ours, kernel, state)
        error = problem.error(ours(), mask, kernel.tile)
        assert error < BFLOAT16_ERROR, f"{name} {shape} {share}: relative error {error}"
        ms = captured_ms(ours)
        rows.append({
            "shape": shape, "kernel": name, "skipped": float(mask.float().mean()), "share": share, "ms": ms,
            "cudnn_ms": dense, "speed_up": dense / ms, "error": error,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    require_gpu()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print(f"{'tokens':>8} {'D':>4} {'kernel':>8} {'skipped':>8} {'ms':>8} {'cuDNN':>8} {'/ cuDNN':>8}")
    rows = []
    for dim, length in itertools.product(HEAD_DIMS, LENGTHS):
        for row in measure(length, dim):
            rows.append(row)
            print(
                f"{length:>8} {dim:>4} {row['kernel']:>8} {row['skipped']:8.3f} {row['ms']:8.4f} "
                f"{row['cudnn_ms']:8.4f} {row['speed_up']:8.2f}", flush=True,
            )  # fmt: skip
    if arguments.json:
        save(arguments.json, rows)


if __name__ == "__main__":
    main()
