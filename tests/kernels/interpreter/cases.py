"""`attend_triton` in Triton's interpreter on CPU tensors, against `attend_reference` in float64.

`test_attend_triton_interpreter.py` runs this file in a process of its own: the interpreter must be chosen before Triton
is imported. bfloat16 is left out, since the interpreter's `tl.dot` is wrong for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite_compile.kernels.attend_triton import attend_triton
from lite_compile.ops import LOG2_E, attend_reference
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

TILE = TileShape(32, 16)
THRESHOLD = -6.0


def make_now(epoch: int = 7, slot: int = 0) -> Tensor:
    return torch.tensor([epoch, 0, slot, 0], dtype=torch.int32)


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


def test_nan_keys_mark_no_more_than_the_reference() -> None:
    q, k, v = make_qkv(1, 1, 64, 700, 32)
    k[0, 0, 640] = math.nan
    state = torch.zeros(state_shape(1, 1, 1, 64, 700, TILE), dtype=torch.int32)
    expected = state.clone()
    attend_triton(q, k, v, state, make_now(), 0.2, THRESHOLD, TILE, torch.empty_like(q))
    attend_reference(q.double(), k.double(), v.double(), expected, make_now(), 0.2, THRESHOLD, TILE)
    ours, theirs = (unpack_bits(x[..., row_layout(44).mask_start :], 44) for x in (state, expected))
    assert theirs.any()
    assert not (ours & ~theirs).any()


def test_rows_and_tiles_of_minus_infinity() -> None:
    q, k, v = make_qkv(1, 1, 32, 96, 32)
    k[..., 0] = 1.0
    k[0, 0, :16] = 0.0
    k[0, 0, :16, 0] = -math.inf  # the tile that is visited first
    q[..., 0] = 1.0
    pair = Pair(q, k, v)
    run(pair, [make_now()] * 2)
    q[0, 0, 5] = 0.0
    q[0, 0, 5, 0] = -math.inf
    k[0, 0, :16, 0] = 1.0
    out, lse = torch.empty_like(q), torch.empty(1, 1, 32)
    attend_triton(q, k, v, pair.state, make_now(slot=-1), 0.2, THRESHOLD, TILE, out, lse)
    assert not out[0, 0, 5].any()
    assert lse[0, 0, 5] == -math.inf
    assert torch.isfinite(out).all()


def test_imposed_empty_row_is_zero() -> None:
    q, k, v = make_qkv(1, 2, 32, 96, 32)
    pair = Pair(q, k, v)
    for state in (pair.state, pair.expected_state):
        state[..., 0] = 7
        state[0, 0, 1, 0, row_layout(6).mask_start :] = 63
    out, lse = torch.empty_like(q), torch.empty(1, 2, 32)
    attend_triton(q, k, v, pair.state, make_now(), 0.2, THRESHOLD, TILE, out, lse)
    doubles = [x.double() for x in (q, k, v)]
    expected, expected_lse = attend_reference(*doubles, pair.expected_state, make_now(), 0.2, THRESHOLD, TILE)
    assert not out[0, 1].any()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(pair.state, pair.expected_state)


@pytest.mark.parametrize("slot", [-1, 2, 9])
def test_a_slot_that_the_state_lacks_uses_none(slot: int) -> None:
    pair = Pair(*make_qkv(1, 2, 64, 96, 32), streams=2)
    run(pair, [make_now()] * 2)
    before = pair.state.clone()
    pair.call(make_now(slot=slot))
    assert torch.equal(pair.state, before)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 2), q_len=st.integers(1, 90), k_len=st.integers(1, 90),
    dim=st.sampled_from([16, 24, 40, 64]), dtype=st.sampled_from([torch.float16, torch.float32]),
    tile=st.sampled_from([TileShape(16, 16), TILE, TileShape(64, 32)]),
    strided=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    scale=st.sampled_from([-0.5, 0.0, 0.125, 0.25, 1.0]), below=st.sampled_from([math.inf, 12, 3, 0]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_dtype_stride_and_scale(
    batch: int, heads: int, q_len: int, k_len: int, dim: int, dtype: torch.dtype, tile: TileShape,
    strided: tuple[bool, bool, bool], scale: float, below: float, seed: int,
) -> None:  # fmt: skip
    """Small integers and scales that are powers of two: scores are exact, so states agree word for word.

    The threshold lies half way between `below` and the next possible difference of two scores.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for length, is_strided in zip((q_len, k_len, k_len), strided, strict=True):
        x = torch.randint(-2, 3, (batch, heads, length, dim), generator=generator).to(dtype)
        tensors.append(x.transpose(1, 2).contiguous().transpose(1, 2) if is_strided else x)
    threshold = -(below + 0.5) * abs(scale) * LOG2_E if scale else -below
    run(Pair(*tensors, tile=tile), [make_now()] * 2, scale=scale, threshold=threshold)


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
