"""Time of one attention call on a GPU at several skipped shares, next to cuDNN's dense attention.

Proves the result right against float64 before it times anything. `python benchmarks/bench_gpu.py [--json FILE]`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite_compile.attention_bench import EPOCH, imposed_state, sustained
from lite_compile.kernels.select_kernel import Kernel, select_kernel

SHAPES = [(1, 12, 32760, 128), (1, 24, 17408, 64), (2, 16, 4096, 64), (1, 24, 4096, 128)]
SKIPPED = [0.0, 0.42, 0.77]


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """q, k, v in bf16, laid out `[B, S, H, D]` in memory as diffusers does."""
    batch, heads, length, dim = shape
    return [
        torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    ]


def check(q: Tensor, k: Tensor, v: Tensor, state: Tensor, mask: Tensor, kernel: Kernel) -> float:
    """Relative error of the first and last rows of tiles against float64 over the kept tiles."""
    tile = kernel.tile
    out, _ = attend(q, k, v, state.clone(), kernel)
    worst = 0.0
    for row in (0, mask.shape[2] - 1):
        rows = slice(row * tile.q, min((row + 1) * tile.q, q.shape[2]))
        scores = q[0, 0, rows].double() @ k[0, 0].double().T * q.shape[-1] ** -0.5
        dropped = mask[0, 0, row].repeat_interleave(tile.k)[: k.shape[2]]
        expected = scores.masked_fill(dropped, -torch.inf).softmax(-1) @ v[0, 0].double()
        worst = max(worst, float((out[0, 0, rows].double() - expected).norm() / expected.norm()))
    assert worst < 6e-3, f"wrong result: relative error {worst}"
    return worst


def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """One call that uses and records the state; random inputs mark nothing at this threshold."""
    return torch.ops.lite_compile.attend(
        q, k, v, state, NOW, q.shape[-1] ** -0.5, THRESHOLD, *kernel.tile, kernel_name=kernel.name
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--kernel", nargs="+", default=["hopper", "triton"], help="default: all that serve the device")
    arguments = parser.parse_args()
    global NOW, THRESHOLD
    NOW = torch.tensor([EPOCH, 1, 0, 1, 0], dtype=torch.int32, device="cuda")
    THRESHOLD = torch.tensor(-1000.0, device="cuda")
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16, sustained")
    print(
        f"{'shape':>20} {'kernel':>8} {'tile':>8} {'skipped':>8} {'ms':>8} {'TF eff.':>8} {'cuDNN ms':>9} "
        f"{'speed-up':>8} {'vs ideal':>8}"
    )
    for shape in SHAPES:
        q, k, v = inputs(shape)
        flops = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
        repeats = 40 if shape[2] > 8192 else 200
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            cudnn = sustained(lambda: F.scaled_dot_product_attention(q, k, v), repeats)  # noqa: B023
        for name in arguments.kernel:
            kernel = select_kernel(q.device, q.dtype, shape[3], name)
            if isinstance(kernel, str):
                print(f"{'x'.join(map(str, shape)):>20} {name:>8}: {kernel}")
                continue
            for share in SKIPPED:
                state, mask = imposed_state(shape, kernel.tile, share, "cuda")
                error = check(q, k, v, state, mask, kernel)
                actual = float(mask.float().mean())
                ms = sustained(lambda: attend(q, k, v, state, kernel), repeats)  # noqa: B023
                row = {
                    "shape": shape, "kernel": name, "tile": kernel.tile, "skipped": actual, "ms": ms, "cudnn_ms": cudnn,
                    "error": error, "effective_tflops": flops * (1 - actual) / ms / 1e9,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{'x'.join(map(str, shape)):>20} {name:>8} {'x'.join(map(str, kernel.tile)):>8} {actual:8.3f} "
                    f"{ms:8.3f} {row['effective_tflops']:8.0f} {cudnn:9.3f} {cudnn / ms:8.2f} "
                    f"{(1 - actual) * cudnn / ms:8.2f}"
                )
    if arguments.json:
        record = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "commit": os.environ.get("LITE_COMMIT", "unknown"), "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
