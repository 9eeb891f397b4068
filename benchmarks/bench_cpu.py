"""Time `attend_cpu` against dense torch SDPA on this CPU, with imposed scattered skip masks: `--help` for the shapes.

The result is first proved right: on the kept tiles, the error against float64 is at most twice that of torch SDPA.
Marking and recording are active in every timed call, at a threshold that marks nothing, so the mask stays as it is.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_compile.attention_bench import MARKS_NOTHING, imposed_state, interleaved, prove
from lite_compile.environment import cpu_name
from lite_compile.kernels.attend_cpu import CPU_TILE, attend_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--skipped", nargs="+", type=float, default=[0, 42, 77], help="per cent of the tiles")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    torch.manual_seed(0)
    tile = CPU_TILE
    now = torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    threshold = torch.tensor(MARKS_NOTHING)
    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"B={args.batch} H={args.heads} S={args.length} D={args.head_dim}, tile {tile.q}x{tile.k}")
    print(f"fastest of {args.repeats} calls, ours and SDPA taking turns")
    print("\n| dtype | skipped % | ms ours | ms SDPA | SDPA / ours |\n|---|---|---|---|---|")
    for name in args.dtypes:
        shape = (args.batch, args.heads, args.length, args.head_dim)
        q, k, v = (torch.randn(shape).to(getattr(torch, name)) for _ in range(3))
        for percent in args.skipped:
            state, skipped = imposed_state(shape, tile, percent / 100)
            out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, state: Tensor = state, out: Tensor = out) -> None:
                attend_cpu(q, k, v, state, now, q.shape[-1] ** -0.5, threshold, tile, out)

            def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v)

            ours()
            prove(q, k, v, skipped, tile, out)
            ours_ms, sdpa_ms = interleaved([ours, sdpa], args.repeats)
            share = 100 * skipped.float().mean().item()
            print(f"| {name} | {share:.1f} | {ours_ms:.1f} | {sdpa_ms:.1f} | {sdpa_ms / ours_ms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
