"""Time `attend_cpu` against dense torch SDPA on this CPU, with imposed scattered skip masks: `--help` for the shapes.

The result is first proved right: on the kept tiles, the error against float64 is at most twice that of torch SDPA.
Marking and recording are active in every timed call, at a threshold that marks nothing, so the mask stays as it is.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_compile.kernels.attend_cpu import CPU_TILE, attend_cpu
from lite_compile.skip_state import EPOCH_WORD, TileShape, pack_bits, row_layout, state_shape, tile_count

MARKS_NOTHING = torch.tensor(-1e4)
"""Log2 units: far below any score of normal data, yet every comparison is made and recorded."""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def imposed_state(q: Tensor, k: Tensor, tile: TileShape, fraction: float) -> tuple[Tensor, Tensor]:
    """State of generation 1 that skips `fraction` of the tiles of each row at random, and the tiles it skips."""
    k_tiles = tile_count(k.shape[2], tile.k)
    layout = row_layout(k_tiles)
    batch, heads, q_len, _ = q.shape
    state = torch.zeros(state_shape(1, batch, heads, q_len, k.shape[2], tile), dtype=torch.int32)
    places = torch.rand(*state.shape[:-1], k_tiles).argsort(-1).argsort(-1)
    skipped = places < round(fraction * k_tiles)
    state[..., EPOCH_WORD] = 1
    state[..., layout.mask_start :] = pack_bits(skipped, layout.mask_words)
    return state, skipped[0]


def prove(q: Tensor, k: Tensor, v: Tensor, skipped: Tensor, tile: TileShape, out: Tensor) -> None:
    """Raise when `out` is further from float64 on the kept tiles than twice the distance of torch SDPA."""
    for head in range(q.shape[1]):  # one head at a time bounds memory
        one = (slice(None), slice(head, head + 1))
        keep = ~skipped[one].repeat_interleave(tile.q, 2).repeat_interleave(tile.k, 3)
        keep = keep[:, :, : q.shape[2], : k.shape[2]]
        exact = F.scaled_dot_product_attention(q[one].double(), k[one].double(), v[one].double(), attn_mask=keep)
        ours = (out[one] - exact).norm().item()
        theirs = (F.scaled_dot_product_attention(q[one], k[one], v[one], attn_mask=keep) - exact).norm().item()
        if not ours <= 2 * theirs:
            raise SystemExit(f"wrong result in head {head}: error {ours:.3g}, torch SDPA's is {theirs:.3g}")


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Fastest time of each call in ms; taking turns exposes all of them to the same neighbours."""
    best = [float("inf")] * len(calls)
    for repeat in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


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
    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"B={args.batch} H={args.heads} S={args.length} D={args.head_dim}, tile {tile.q}x{tile.k}")
    print(f"fastest of {args.repeats} calls, ours and SDPA taking turns")
    print("\n| dtype | skipped % | ms ours | ms SDPA | SDPA / ours |\n|---|---|---|---|---|")
    for name in args.dtypes:
        shape = (args.batch, args.heads, args.length, args.head_dim)
        q, k, v = (torch.randn(shape).to(getattr(torch, name)) for _ in range(3))
        for percent in args.skipped:
            state, skipped = imposed_state(q, k, tile, percent / 100)
            out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, state: Tensor = state, out: Tensor = out) -> None:
                attend_cpu(q, k, v, state, now, q.shape[-1] ** -0.5, MARKS_NOTHING, tile, out)

            def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v)

            ours()
            prove(q, k, v, skipped, tile, out)
            ours_ms, sdpa_ms = interleaved([ours, sdpa], args.repeats)
            share = 100 * skipped.float().mean().item()
            print(f"| {name} | {share:.1f} | {ours_ms:.1f} | {sdpa_ms:.1f} | {sdpa_ms / ours_ms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
