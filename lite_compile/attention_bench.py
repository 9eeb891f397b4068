"""One attention call with an imposed skip mask: proved right against float64, then timed against PyTorch's."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.select_kernel import Kernel
from .ops import NOW_EPOCH, NOW_GENERATION, NOW_WORDS
from .skip_state import EPOCH_WORD, TileShape, pack_bits, row_layout, state_shape, tile_count

MARKS_NOTHING = -1e4
"""Threshold in log2 units: far below any score of normal data, yet every comparison is made and recorded."""
EPOCH = 1

Shape = tuple[int, int, int, int]
"""`(B, H, S, D)`."""


class BenchRow(NamedTuple):
    """Result for one share of skipped tiles."""

    skipped: float
    """Share that was skipped, 0 to 1."""
    ms: float
    dense_ms: float
    """PyTorch's attention, nothing skipped."""
    error: float
    """Relative L2 error against float64 over the kept tiles."""
    dense_error: float
    """That of PyTorch's attention with the same tiles masked."""


class WrongResultError(RuntimeError):
    """The kernel's result is further from float64 than it may be."""


def imposed_state(
    shape: Shape, tile: TileShape, skipped: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A state that skips a random share of the tiles of each row, never all; and these, bool `[B, H, qt, kt]`."""
    batch, heads, length, _ = shape
    k_tiles = tile_count(length, tile.k)
    layout = row_layout(k_tiles)
    state = torch.zeros(state_shape(1, batch, heads, length, length, tile), dtype=torch.int32, device=device)
    order = torch.rand(*state.shape[1:4], k_tiles, device=device).argsort(-1).argsort(-1)
    mask = order < min(round(skipped * k_tiles), k_tiles - 1)
    state[0, ..., EPOCH_WORD] = EPOCH
    state[0, ..., layout.mask_start :] = pack_bits(mask, layout.mask_words)
    return state, mask


def prove(
    q: Tensor, k: Tensor, v: Tensor, skipped: Tensor, tile: TileShape, out: Tensor, limit: int | None = None
) -> tuple[float, float]:
    """Relative L2 errors of `out` and of PyTorch's attention, against float64 over the tiles that are not skipped.

    Args:
        skipped: bool `[B, H, q_tiles, k_tiles]`.
        limit: look at so many batch entries, heads of each, and tiles of queries of each of these; None: all.

    Raises:
        WrongResultError: `out` is more than twice as far from float64 as PyTorch's attention is.
    """
    # On a GPU the multiplication of float32 is made of three in lower precision, as in tests/gpu.
    slack = 1e-6 if q.device.type == "cuda" else 0.0
    total = torch.zeros(3, dtype=torch.float64)
    for b, h in itertools.product(*(_some(count, limit) for count in skipped.shape[:2])):
        one, squares = (slice(b, b + 1), slice(h, h + 1)), torch.zeros(3, dtype=torch.float64)
        for row in _some(skipped.shape[2], limit):
            rows = (*one, slice(row * tile.q, min((row + 1) * tile.q, q.shape[2])))
            keep = ~skipped[b, h, row].repeat_interleave(tile.k)[None, None, None, : k.shape[2]]
            exact = F.scaled_dot_product_attention(q[rows].double(), k[one].double(), v[one].double(), attn_mask=keep)
            dense = F.scaled_dot_product_attention(q[rows], k[one], v[one], attn_mask=keep)
            distances = [(x.double() - exact).square().sum() for x in (out[rows], dense)]
            squares += torch.stack([*distances, exact.square().sum()]).cpu()
        ours, theirs, norm = squares.sqrt().tolist()
        if not ours <= 2 * theirs + slack * norm:
            raise WrongResultError(
                f"wrong result in batch entry {b}, head {h}: relative error {ours / norm:.2g}, "
                f"that of PyTorch is {theirs / norm:.2g}"
            )
        total += squares
    ours, theirs, norm = total.sqrt().tolist()
    return ours / norm, theirs / norm


class _Problem:
    """Random q, k, v, laid out `[B, S, H, D]` in memory as diffusers does, and an imposed skip mask."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, kernel: Kernel, skipped: float) -> None:
        batch, heads, length, dim = shape
        q, k, v = (torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2) for _ in range(3))
        self.operands, self.kernel, self.scale = (q, k, v), kernel, dim**-0.5
        self.state, self.mask = imposed_state(shape, kernel.tile, skipped, device)
        self.now = torch.zeros(NOW_WORDS, dtype=torch.int32, device=device)
        self.now[NOW_EPOCH] = self.now[NOW_GENERATION] = EPOCH
        self.threshold = torch.tensor(MARKS_NOTHING, device=device)

    def ours(self) -> Tensor:
        """One call that uses and records the state."""
        name = "triton" if self.kernel.name == "cpu" else self.kernel.name
        attend = torch.ops.lite_compile.attend
        given = (*self.operands, self.state, self.now, self.scale, self.threshold, *self.kernel.tile)
        out: Tensor = attend(*given, kernel_name=name)[0]
        return out

    def dense(self) -> Tensor:
        """PyTorch's attention, nothing skipped."""
        return F.scaled_dot_product_attention(*self.operands)

    def prove(self) -> tuple[float, float]:
        """`prove` on a sample of heads and queries."""
        return prove(*self.operands, self.mask, self.kernel.tile, self.ours(), limit=4)


def bench_once(shape: Shape, dtype: torch.dtype, device: torch.device, kernel: Kernel) -> tuple[float, float]:
    """Prove one call with half of its tiles skipped; the two errors of `prove`."""
    return _Problem(shape, dtype, device, kernel, 0.5).prove()


def bench_attention(
    shape: Shape, dtype: torch.dtype, device: torch.device, kernel: Kernel, skipped: float, repeats: int
) -> BenchRow:
    """Prove and time a kernel at one share of skipped tiles; state is read and written in every timed call."""
    problem = _Problem(shape, dtype, device, kernel, skipped)
    errors = problem.prove()
    calls = (problem.ours, problem.dense)
    times = [sustained(c, repeats) for c in calls] if device.type == "cuda" else interleaved(calls, repeats)
    return BenchRow(float(problem.mask.float().mean()), times[0], times[1], *errors)


def interleaved(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Fastest time of each call in ms; taking turns exposes all of them to the same neighbours."""
    best = [float("inf")] * len(calls)
    for repeat in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def sustained(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of back-to-back launches on a GPU."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(5):
        call()
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times)


def _some(count: int, limit: int | None) -> list[int]:
    """All numbers below `count`, or `limit` of them, the first and the last included."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted({i * (count - 1) // (limit - 1) for i in range(limit)})
