"""Time what a call costs the host: a Wan transformer of 30 tiny blocks, its blocks compiled one by one.

On a GPU everything is launched and nothing is waited for: work of 64 tokens is done before the host asks for more. On a
CPU the kernel of our attention is replaced by nothing, while Inductor's baseline computes its own. The clock, which is
plain torch there and three kernels on a GPU, stands by itself, and so does looking through the model's contents.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from lite_compile import ops
from lite_compile.environment import cpu_name
from lite_compile.module_contents import ModuleContents
from lite_compile.root_clock import RootClock

BLOCKS = 30
PARTS = ("blocks", "clock", "contents", "forward")

spent: defaultdict[str, float] = defaultdict(float)
"""Seconds of one forward, by part."""


def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """`function`, which adds its time to that of `part`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    return call


def tiny_wan(device: str, dtype: torch.dtype, **compiled: Any) -> Any:
    """The model, its blocks compiled with these arguments and timed."""
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=BLOCKS, rope_max_seq_len=64,
    ).to(device, dtype).eval()  # fmt: skip
    model.compile_repeated_blocks(fullgraph=True, **compiled)
    for block in model.blocks:
        block._compiled_call_impl = timed(block._compiled_call_impl, "blocks")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.device == "cpu":
        ops.intercept = lambda kernel: lambda *args: None
    for owner, name, part in ((RootClock, "read", "clock"), (ModuleContents, "unchanged", "contents")):
        setattr(owner, name, timed(getattr(owner, name), part))
    models = {
        "Inductor": tiny_wan(args.device, dtype),
        "ours": tiny_wan(args.device, dtype, backend="liteattention", options={"min_seq_len": 64}),
    }
    latents, prompt = (torch.randn(size).to(args.device, dtype) for size in ((1, 4, 1, 16, 16), (1, 8, 16)))
    steps = [torch.tensor([1000.0 - 20 * step], device=args.device) for step in range(50)]
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    where = "" if args.device == "cpu" else f", {torch.cuda.get_device_name()}"
    print(f"{cpu_name()}{where}, torch {torch.__version__}; {BLOCKS} blocks, {args.repeats} forwards of each, in turns")
    with torch.no_grad():
        for repeat in range(-5, args.repeats):
            if repeat == 0:
                gc.collect()
                gc.disable()
            for name, model in models.items():
                spent.clear()
                timed(model, "forward")(latents, steps[repeat % 50], prompt)
                if args.device == "cuda":
                    torch.cuda.synchronize()
                spent["blocks"] -= spent["clock"]  # which the first block advances
                if repeat >= 0:
                    for part in PARTS:
                        samples[name, part].append(1e6 * spent[part])
    print("\n| | us per block | us outside of blocks | of that, contents | us for the clock | us per forward |")
    print("|---|---|---|---|---|---|")
    for name in models:
        forward, blocks, clock = (samples[name, part] for part in ("forward", "blocks", "clock"))
        outside = [all_of_it - b - c for all_of_it, b, c in zip(forward, blocks, clock, strict=True)]
        columns = [b / BLOCKS for b in blocks], outside, samples[name, "contents"], clock, forward
        print(f"| {name} | " + " | ".join(f"{min(x):.0f} ({sorted(x)[len(x) // 2]:.0f})" for x in columns) + " |")
    print("\nfastest (median)")


if __name__ == "__main__":
    main()
