"""The protocol of the Hopper kernel's partitions, on a machine that runs its source at speeds chosen by chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gluon_machine import Machine
from gluon_memory import Descriptor, Pointer, block

from lite_compile.kernels.hopper_pipeline import CONSUMER_ROWS, HOPPER_TILE
from lite_compile.kernels.hopper_workers import attend_kernel
from lite_compile.ops import LOG2_E
from lite_compile.skip_state import tile_count

TILE = HOPPER_TILE
BATCH, HEADS, KV_HEADS, Q_LEN, K_LEN, DIM = 2, 2, 1, 250, 300, 64
Q_TILES, K_TILES = tile_count(Q_LEN, TILE.q), tile_count(K_LEN, TILE.k)
PROGRAMS = BATCH * HEADS * Q_TILES
ROWS = CONSUMER_ROWS
"""Queries that share a scale."""
THRESHOLD = -3.0


def run(
    workers: int, seed: int, qk: torch.dtype, biased: bool, fixed_shift: bool = False, sharpness: float = 1.0,
    hides_a_tile: bool = False, by_mass: bool = False, value_scale: float = 1.0,
) -> int:  # fmt: skip
    """Run the kernel over rows with 0 to all of their tiles; compare results and notes with float64.

    The longest keys, which are the last, are longer than the first by `sharpness`. `hides_a_tile`: scores of the first
    tile are -inf, being too large for float32, and the others are far below 0. `value_scale`: what V is multiplied by;
    if it is not 1, every program visits the first tile first.

    Returns how many programs were done again.
    """
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if fixed_shift else torch.float16
    q, k, v = (
        torch.randn(BATCH, heads, length, DIM).to(dtype)
        for heads, length in ((HEADS, Q_LEN), (KV_HEADS, K_LEN), (KV_HEADS, K_LEN))
    )
    if qk.itemsize == 2:
        k *= (sharpness ** torch.linspace(0, 1, K_LEN))[:, None].to(dtype)
    if hides_a_tile:
        q[..., 0], k[..., 0], k[:, :, : TILE.k, 0] = 1000.0, -4.0, -3e38
    v *= value_scale
    q_scales = k_scales = None
    q_scale, k_scale = torch.ones(BATCH, HEADS, Q_LEN, 1), torch.ones(BATCH, KV_HEADS, K_LEN, 1)
    if qk.itemsize == 1:
        q, k = ((x * 20).round().to(qk) for x in (q, k))
        q_scales = torch.rand(BATCH, HEADS, tile_count(Q_LEN, ROWS)) / 30
        k_scales = torch.rand(BATCH, KV_HEADS, K_TILES) / 30 * sharpness ** torch.linspace(0, 1, K_TILES)
        q_scale = q_scales.repeat_interleave(ROWS, 2)[:, :, :Q_LEN, None]
        k_scale = k_scales.repeat_interleave(TILE.k, 2)[:, :, :K_LEN, None]
    key_bias = torch.randn(BATCH, K_LEN) if biased else None
    out, lse = (
        torch.full((BATCH, HEADS, Q_LEN, DIM), 77.0, dtype=dtype),
        torch.full((BATCH, HEADS, Q_LEN), 77.0),
    )

    ranks = torch.rand(PROGRAMS, K_TILES)
    if value_scale != 1:
        ranks[:, 0] = -1
    order = ranks.argsort(1).to(torch.int16)
    counts = torch.cat([torch.randint(0, K_TILES + 1, (PROGRAMS,)), torch.zeros(1, dtype=torch.int64)]).int()
    visited = torch.zeros(PROGRAMS, K_TILES, dtype=torch.bool)
    for program, count in enumerate(counts[:-1]):
        visited[program, order[program, :count].long()] = True
        order[program, count:] = 9999
    notes = torch.tensor([0, *[1] * K_TILES, *[0] * K_TILES], dtype=torch.int8).repeat(PROGRAMS, 1)
    places = torch.randperm(PROGRAMS)
    queue = (places << 32) | counts[:-1][places].long()

    def at(x: torch.Tensor | None) -> Pointer | None:
        return None if x is None else Pointer(x)

    blocks = [Descriptor(x, rows, DIM) for x, rows in ((q, ROWS), (k, TILE.k), (v, TILE.k), (out, ROWS))]
    flags = torch.ones(BATCH, K_TILES, dtype=torch.int8) if biased else None
    lengths = (PROGRAMS, HEADS, HEADS // KV_HEADS, Q_LEN, K_LEN, Q_TILES, K_TILES, K_LEN if biased else 0)
    scale, threshold = DIM**-0.5, torch.tensor(THRESHOLD)
    Machine(seed).run(
        attend_kernel, workers,
        [
            *blocks, *map(at, (lse, key_bias, flags, q_scales, k_scales, order, notes, counts, queue)),
            *map(block, lengths), scale * LOG2_E, Pointer(threshold),
            K_LEN % TILE.k == 0, True, biased, 8 * qk.itemsize, by_mass, fixed_shift,
        ],
    )  # fmt: skip

    given: list[Any] = [q.double() * q_scale, k.double() * k_scale, v.double()]
    q64, k64, v64 = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in given)
    scores = q64 @ k64.mT * scale + (0.0 if key_bias is None else key_bias.double()[:, None, None])
    scores = scores.float().double()  # so that what overflows does so here, too
    for program in range(PROGRAMS):
        (b, h), start = divmod(program // Q_TILES, HEADS), program % Q_TILES * TILE.q
        rows = slice(start, start + TILE.q)
        keep = visited[program].repeat_interleave(TILE.k)[:K_LEN]
        kept = scores[b, h, rows].masked_fill(~keep, -math.inf)
        expected = kept.softmax(-1).nan_to_num(0.0) @ v64[b, h]
        assert (out[b, h, rows].double() - expected).norm() <= (4e-3 if fixed_shift else 2e-3) * expected.norm()
        # In int8 with a running maximum the kernel counts on fused multiply-add, which the machine has not.
        assert torch.allclose(lse[b, h, rows].double(), kept.logsumexp(-1), rtol=1e-6, atol=1e-3)
        raised = torch.zeros(K_TILES, dtype=torch.int8)
        raised[kept.argmax(-1) // TILE.k] = 1  # a row that has met nothing counts for tile 0
        marks = ~visited[program] | negligible(kept * LOG2_E, order[program, : counts[program]].tolist(), by_mass)
        assert notes[program].tolist() == [0, *marks.int().tolist(), *raised.tolist()]
    assert int(counts[-1]) == PROGRAMS  # with each that it begins a worker asks for the next
    return blocks[0].loads // (TILE.q // ROWS) - PROGRAMS


def negligible(scores: torch.Tensor, order: list[int], by_mass: bool) -> torch.Tensor:
    """bool `[K_TILES]`: tiles that no row of `scores`, in log2 units, needs beside what it has met before."""
    found = torch.zeros(K_TILES, dtype=torch.bool)
    running = torch.full(scores.shape[:1], -math.inf, dtype=scores.dtype)
    for tile in order:
        own = scores[:, tile * TILE.k : (tile + 1) * TILE.k]
        measured = torch.logsumexp(own / LOG2_E, 1) * LOG2_E if by_mass else own.amax(1)
        met = torch.logaddexp2(running, measured)
        difference = measured - (met if by_mass else running)  # NaN while a row has met nothing but -inf
        limit = THRESHOLD - math.log2(K_TILES) if by_mass else THRESHOLD
        assert not ((difference - limit).abs() <= 1e-4).any(), "too close to say"
        found[tile] = bool((difference <= limit).all())
        running = met if by_mass else torch.maximum(running, measured)
    return found


@pytest.mark.parametrize("qk", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_partitions_wait_for_each_other(workers: int, qk: torch.dtype, biased: bool) -> None:
    """Of eight tiles of queries, whose rows visit none, some or all of their tiles."""
    assert workers <= PROGRAMS == 8
    for seed in range(4):
        run(workers, seed, qk, biased)


@pytest.mark.parametrize("by_mass", [False, True], ids=["max", "mass"])
@pytest.mark.parametrize("qk", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("sharpness", "least"), [(1.0, 0), (30.0, 1), (3000.0, 6)])
@pytest.mark.parametrize("workers", [1, 8])
def test_programs_that_exceed_their_shift_are_done_again(
    workers: int, sharpness: float, least: int, qk: torch.dtype, by_mass: bool
) -> None:
    """Of 32, of which 20 or so visit more than one tile: none, `least` and more."""
    repeated = sum(run(workers, seed, qk, False, True, sharpness, by_mass=by_mass) for seed in range(4))
    assert least <= repeated <= (20 if least else 0)


@pytest.mark.parametrize("by_mass", [False, True], ids=["max", "mass"])
@pytest.mark.parametrize("fixed_shift", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_rows_that_begin_with_nothing(workers: int, fixed_shift: bool, by_mass: bool) -> None:
    """Programs that do are done again, among them some of a single tile."""
    dtype = torch.bfloat16 if fixed_shift else torch.float16
    repeated = sum(
        run(workers, seed, dtype, False, fixed_shift, hides_a_tile=True, by_mass=by_mass) for seed in range(6)
    )
    assert (repeated > 0) is fixed_shift


def test_programs_done_again_keep_small_values_precise() -> None:
    """The room that first attempts leave above a row's maximum would push such products below float32's exponents."""
    for seed in range(3):
        assert run(3, seed, torch.bfloat16, False, True, hides_a_tile=True, value_scale=2.0**-95) > 0


def test_the_machine_notices_who_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a consumer overwrites its results, or ends, before they have left; at some speeds nobody would see."""
    monkeypatch.setattr(Machine, "_stored", lambda machine: lambda: True)

    def run_often() -> None:
        for seed in range(8):
            run(1, seed, torch.float16, False)

    with pytest.raises(AssertionError, match=r"written while it is read|ended before"):
        run_often()
