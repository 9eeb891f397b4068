"""Time of one forward of Wan-shaped transformers (random weights) with imposed skip masks, next to Inductor with cuDNN.

`python benchmarks/bench_forward.py [--model 1.3b 14b-whole] [--compile whole blocks] [--json FILE]`. Both are compiled
alike: the whole model, where compiling takes two to three seconds per layer for either of the two, or blocks one by one
(`compile_repeated_blocks`); and both run where SDPA is cuDNN's, which is what cross-attention stays with. Needs
diffusers and a GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from conditions import save
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import lite_compile
from lite_compile.layer_state import layer_states
from lite_compile.skip_state import EPOCH_WORD, pack_bits, row_layout, tile_count

MODELS: dict[str, dict[str, Any]] = {
    "1.3b": {"heads": 12, "ffn": 8960, "layers": 30, "of": 30, "latents": (21, 60, 104)},
    "14b": {"heads": 40, "ffn": 13824, "layers": 4, "of": 40, "latents": (21, 90, 160)},
    "14b-deep": {"heads": 40, "ffn": 13824, "layers": 12, "of": 40, "latents": (21, 90, 160)},
    "14b-whole": {"heads": 40, "ffn": 13824, "layers": 40, "of": 40, "latents": (21, 90, 160)},
    "1.3b-short": {"heads": 12, "ffn": 8960, "layers": 30, "of": 30, "latents": (4, 64, 64)},
}
"""Wan2.1 at 480p, four, twelve and all of the 40 layers of Wan2.1-14B at 720p, and 4,096 tokens, where launching takes
its share. With four layers, what surrounds them weighs ten times what it does in the whole model."""
DEFAULT_MODELS = ("1.3b", "14b-deep", "1.3b-short")
SKIPPED = (0.0, 0.42, 0.57, 0.77)
ROUNDS, CALLS = 3, 3
"""Dense and sparse forwards take turns, since a card that has become warm is slower: what is timed first would win."""


def make_model(shape: dict[str, Any]) -> WanTransformer3DModel:
    """A transformer of that shape with random weights, bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = WanTransformer3DModel(
            num_attention_heads=shape["heads"], attention_head_dim=128, ffn_dim=shape["ffn"], num_layers=shape["layers"]
        )
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def trajectory(shape: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Arguments of consecutive denoising steps of one generation."""
    make = torch.Generator("cuda").manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=make)

    start, drift, text = random(1, 16, *shape["latents"]), random(1, 16, *shape["latents"]), random(1, 512, 4096)
    for step in range(1000):
        yield {
            "hidden_states": start + 0.003 * step * drift,
            "timestep": torch.tensor([1000.0 - step], device="cuda"),
            "encoder_hidden_states": text,
        }


def impose(model: WanTransformer3DModel, skipped: float) -> float:
    """Let each row of tiles of the running generation skip that share of its tiles, at random; the share it is."""
    shares = []
    for layer in layer_states(model):
        k_tiles = tile_count(layer.spec.k_len, layer.spec.tile.k)
        rows = layer.state[0]
        order = torch.rand(*rows.shape[:-1], k_tiles, device="cuda").argsort(-1).argsort(-1)
        mask = order < round(skipped * k_tiles)
        layout = row_layout(k_tiles)
        rows[..., layout.mask_start :] = pack_bits(mask, layout.mask_words)
        assert bool((rows[..., EPOCH_WORD] == rows[0, 0, 0, EPOCH_WORD]).all())
        shares.append(float(mask.float().mean()))
    return statistics.mean(shares)


def timed(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each of `CALLS` calls back to back, after one more."""
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def compile_model(model: WanTransformer3DModel, part: str, **kwargs: Any) -> None:
    """Compile the `whole` model or its `blocks`, in place."""
    if part == "whole":
        model.compile(fullgraph=True, **kwargs)
    else:
        model.compile_repeated_blocks(fullgraph=True, **kwargs)


@torch.no_grad()
def measure(
    name: str, part: str, rounds: int, shares: Collection[float], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row per share of the tiles that is skipped; one alone where attention stays dense."""
    shape = MODELS[name]
    dense = make_model(shape)
    # With the same weights: two of 14B would fill the card.
    sparse = copy.deepcopy(dense, {id(weight): weight for weight in dense.parameters()})
    compile_model(dense, part)
    compile_model(sparse, part, backend="liteattention", options={"threshold": -float("inf"), **options})
    dense_steps, steps = trajectory(shape), trajectory(shape)
    expected, result = dense(**next(dense_steps)).sample, sparse(**next(steps)).sample
    error = float((result - expected).norm() / expected.norm())
    del expected, result
    rewritten = lite_compile.report().rewritten
    if not layer_states(sparse):
        rewritten, shares = [], [0.0]
    dense_ms: list[float] = []
    ms: dict[float, list[float]] = {skipped: [] for skipped in shares}
    imposed: dict[float, float] = {}
    for _ in tqdm(range(rounds), f"{name}, {part}", disable=None, leave=False):
        dense_ms += timed(lambda: dense(**next(dense_steps)))
        for skipped in shares:
            imposed[skipped] = impose(sparse, skipped) if rewritten else 0.0
            ms[skipped] += timed(lambda: sparse(**next(steps)))
            if not rewritten:
                continue
            density = lite_compile.stats(sparse).density
            assert abs(density - (1 - imposed[skipped])) < 1e-3, f"density {density}, imposed {1 - imposed[skipped]}"
    for skipped in shares:
        yield {
            "model": name, "compiled": part, "layers": shape["layers"], "skipped": imposed[skipped],
            "ms": statistics.median(ms[skipped]), "inductor_cudnn_ms": statistics.median(dense_ms),
            "error_with_nothing_skipped": error, "options": options,
            "kernel": rewritten[-1].kernel if rewritten else "dense",
            "state_bytes_of_all_layers": shape["of"] * layer_states(sparse)[0].state.nbytes if rewritten else 0,
            "all_ms": ms[skipped], "all_inductor_cudnn_ms": dense_ms,
        }  # fmt: skip


def skipped_share(text: str) -> float:
    """A share of the tiles, of which at least one has to be left."""
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: from 0 to less than 1")
    return share


@sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=DEFAULT_MODELS, help=f"default: {DEFAULT_MODELS}"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--skipped", type=skipped_share, nargs="+", default=SKIPPED, help=f"default: {SKIPPED}")
    parser.add_argument("--min-seq-len", type=int, help="the option of that name; default: 'auto'")
    parser.add_argument(
        "--compile", nargs="+", choices=("whole", "blocks"), default=["whole"], help="default: the whole model"
    )
    arguments = parser.parse_args()
    options = {} if arguments.min_seq_len is None else {"min_seq_len": arguments.min_seq_len}
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    print(
        f"{'model':>10} {'compiled':>8} {'kernel':>8} {'skipped':>8} {'ms':>8} {'Inductor + cuDNN':>17} "
        f"{'speed-up':>9} {'error':>8}"
    )
    for name, part in itertools.product(arguments.model, arguments.compile):
        for row in measure(name, part, arguments.rounds, dict.fromkeys(arguments.skipped), options):
            rows.append(row)
            print(
                f"{name:>10} {part:>8} {row['kernel']:>8} {row['skipped']:8.3f} {row['ms']:8.1f} "
                f"{row['inductor_cudnn_ms']:17.1f} {row['inductor_cudnn_ms'] / row['ms']:9.2f} "
                f"{row['error_with_nothing_skipped']:8.1e}",
                flush=True,
            )
        print(f"      state of all layers, 4 streams: {rows[-1]['state_bytes_of_all_layers'] / 1e6:.0f} MB")
        if arguments.json:  # after each model, so that a run that is cut short leaves what it measured
            save(arguments.json, rows)


if __name__ == "__main__":
    main()
