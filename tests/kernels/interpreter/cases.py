"""`attend_triton` in Triton's interpreter on CPU tensors, against `attend_reference` in float64.

`test_attend_triton_interpreter.py` runs this file in a process of its own: the interpreter must be chosen before Triton
is imported. bfloat16 is left out, since the interpreter's `tl.dot` is wrong for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from lite_compile.kernels.attend_triton import attend_triton
from lite_compile.ops import LOG2_E, attend_reference
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

TILE = TileShape(32, 16)
THRESHOLD = -6.0


def make_now(generation: int = 7, slot: int = 0) -> Tensor:
    return torch.tensor([generation, 0, slot, 0], dtype=torch.int32)


def make_qkv(
    batch: int, heads: int, q_len: int, k_len: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, H, S, dim]` views of `[B, S, H, dim]` memory, peaked along the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, dim, generator=generator)

    def along(length: int) -> Tensor:
        near = centres[torch.arange(length) * 8 // length][None, :, None]
        return near * (60 / dim) ** 0.5 + torch.randn(batch, length, heads, dim, generator=generator) * dim**-0.25

    q, k = along(q_len), along(k_len)
    v = torch.randn(batch, k_len, heads, dim, generator=generator)
    return tuple(x.to(dtype).transpose(1, 2) for x in (q, k, v))


class Pair:
    """The kernel and the float64 reference, each with a state of its own."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, streams: int = 1, tile: TileShape = TILE) -> None:
        self.q, self.k, self.v, self.tile = q, k, v, tile
        shape = state_shape(streams, q.shape[0], q.shape[1], q.shape[2], k.shape[2], tile)
        self.state = torch.zeros(shape, dtype=torch.int32)
        self.expected_state = self.state.clone()

    def call(self, now: Tensor, threshold: float = THRESHOLD, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Run both, compare all they return and record; the kernel's `(out, lse)`."""
        q, k, v = self.q, self.k, self.v
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), math.nan, dtype=q.dtype).transpose(1, 2)
        lse = torch.full(q.shape[:3], math.nan)
        attend_triton(q, k, v, self.state, now, scale, threshold, self.tile, out, lse)
        exact = [x.double() for x in (q, k, v)]
        expected, expected_lse = attend_reference(*exact, self.expected_state, now, scale, threshold, self.tile)
        low = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).double()
        dense = torch.nn.functional.scaled_dot_product_attention(*exact, scale=scale)
        bound = 2 * (low - dense).abs().max() + 1e-6
        assert (out.double() - expected).abs().max() <= bound
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5)
        assert torch.equal(self.state, self.expected_state)
        return out, lse

    def marks(self, slot: int = 0) -> Tensor:
        """bool `[B, H, q_tiles, k_tiles]`: tiles that the kernel's state skips."""
        k_tiles = tile_count(self.k.shape[2], self.tile.k)
        return unpack_bits(self.state[slot, ..., row_layout(k_tiles).mask_start :], k_tiles)


def oracle_marks(q: Tensor, k: Tensor, threshold: float, tile: TileShape) -> Tensor:
    """bool `[B, H, q_tiles, k_tiles]`: tiles negligible against the *final* maximum of each of their rows."""
    scores = (q.double() @ k.double().transpose(2, 3)) * (q.shape[-1] ** -0.5 * LOG2_E)
    below = torch.stack([part.amax(3) for part in scores.split(tile.k, 3)], 3) <= scores.amax(3)[..., None] + threshold
    return torch.stack([part.all(2) for part in below.split(tile.q, 2)], 2)


def run(pair: Pair, nows: Iterable[Tensor], **arguments: float) -> None:
    for now in nows:
        pair.call(now, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 128])
def test_matches_reference_at_each_head_dim(dim: int, dtype: torch.dtype) -> None:
    pair = Pair(*make_qkv(1, 2, 70, 130, dim, dtype))
    run(pair, [make_now()] * 3)
    assert pair.marks().float().mean() > 0.3


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 50), (33, 16), (64, 128), (100, 37), (20, 700)])
def test_matches_reference_at_each_length(q_len: int, k_len: int) -> None:
    run(Pair(*make_qkv(2, 1, q_len, k_len, 32)), [make_now()] * 4)


def test_more_tiles_than_one_block_and_grouped_anchors() -> None:
    pair = Pair(*make_qkv(1, 1, 40, 16 * 520 + 5, 16))
    assert row_layout(521).anchor_group == 5
    run(pair, [make_now()] * 3)
    assert pair.marks().float().mean() > 0.3


def test_streams_are_apart() -> None:
    pair = Pair(*make_qkv(1, 2, 64, 96, 32), streams=2)
    run(pair, [make_now(slot=1)] * 2)
    assert pair.marks(1).any()
    assert not pair.state[0].any()


def test_no_slot_computes_everything_and_records_nothing() -> None:
    pair = Pair(*make_qkv(1, 2, 64, 96, 32))
    run(pair, [make_now(), make_now()])
    before = pair.state.clone()
    pair.call(make_now(slot=-1))
    assert torch.equal(pair.state, before)


def test_stale_generation_reads_as_empty() -> None:
    pair = Pair(*make_qkv(1, 2, 64, 96, 32))
    run(pair, [make_now(7), make_now(7)])
    assert pair.marks().any()
    pair.call(make_now(8), threshold=-math.inf)
    assert not pair.marks().any()


def test_infinite_threshold_never_marks() -> None:
    pair = Pair(*make_qkv(1, 2, 50, 96, 32))
    run(pair, [make_now()] * 2, threshold=-math.inf)
    assert not pair.marks().any()


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
def test_any_scale(scale: float) -> None:
    run(Pair(*make_qkv(1, 1, 40, 50, 32)), [make_now()] * 2, scale=scale)


def test_last_stride_may_be_any() -> None:
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in make_qkv(1, 1, 40, 50, 32))
    Pair(q, k, v).call(make_now())


def test_nan_never_marks() -> None:
    q, k, v = make_qkv(1, 1, 32, 96, 32)
    q[0, 0, 3] = math.nan
    state = torch.zeros(state_shape(1, 1, 1, 32, 96, TILE), dtype=torch.int32)
    out = torch.empty_like(q)
    attend_triton(q, k, v, state, make_now(), 0.2, 0.0, TILE, out)
    assert out[0, 0, 3].isnan().all()
    assert not unpack_bits(state[..., row_layout(6).mask_start :], 6).any()


def test_without_lse() -> None:
    pair = Pair(*make_qkv(1, 1, 40, 50, 32))
    expected, _ = pair.call(make_now())
    out = torch.full_like(expected, math.nan)
    attend_triton(pair.q, pair.k, pair.v, pair.state, make_now(slot=-1), 32**-0.5, THRESHOLD, TILE, out)
    assert torch.equal(out, expected)


def test_marks_what_an_oracle_would() -> None:
    pair = Pair(*make_qkv(1, 2, 128, 400, 32))
    run(pair, [make_now()] * 3)
    oracle, marks = oracle_marks(pair.q, pair.k, THRESHOLD, TILE), pair.marks()
    assert oracle.float().mean() > 0.3
    assert not (marks & ~oracle).any()
    assert (marks & oracle).sum() >= 0.9 * oracle.sum()
