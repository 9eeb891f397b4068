"""`attend_triton` in Triton's interpreter on CPU tensors, against `attend_reference` in float64.

`test_interpreter.py` runs this file in a process of its own: the interpreter must be chosen before Triton
is imported. bfloat16 is left out, since the interpreter's `tl.dot` is wrong for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite_compile.kernels.attend_triton import attend_triton
from lite_compile.ops import COMPUTED_TILE, FREE_TILE, HIDDEN_TILE, LOG2_E, attend_reference, touched_tiles
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

TILE = TileShape(32, 16)
THRESHOLD = torch.tensor(-6.0)


def make_now(epoch: int = 7, slot: int = 0) -> Tensor:
    return torch.tensor([epoch, 0, slot, 0, 0], dtype=torch.int32)


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

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, streams: int = 1, tile: TileShape = TILE,
        key_bias: Tensor | None = None, protected: Sequence[int] = (), kinds: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.tile = q, k, v, tile
        self.key_bias, self.protected, self.kinds = key_bias, protected, kinds
        shape = state_shape(streams, q.shape[0], q.shape[1], q.shape[2], k.shape[2], tile)
        self.state = torch.zeros(shape, dtype=torch.int32)
        self.expected_state = self.state.clone()

    def call(
        self, now: Tensor, threshold: Tensor | float = THRESHOLD, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run both, compare all they return and record; the kernel's `(out, lse)`."""
        q, k, v, bias, protected = self.q, self.k, self.v, self.key_bias, self.protected
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        threshold = torch.as_tensor(threshold, dtype=torch.float32)
        out = torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), math.nan, dtype=q.dtype).transpose(1, 2)
        lse = torch.full(q.shape[:3], math.nan)
        attend_triton(
            q, k, v, self.state, now, scale, threshold, self.tile, out, lse, bias, protected, key_tiles=self.kinds
        )
        exact = [x.double() for x in (q, k, v)]
        expected, expected_lse = attend_reference(
            *exact, self.expected_state, now, scale, threshold, self.tile, bias, protected, key_tiles=self.kinds
        )
        low, dense = (
            torch.nn.functional.scaled_dot_product_attention(
                *tensors, None if bias is None else bias[:, None, None].to(tensors[0]), scale=scale, enable_gqa=True
            ).double()
            for tensors in ((q, k, v), exact)
        )
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


@pytest.mark.parametrize("threshold", [math.nan, 0.5, math.inf])
def test_a_threshold_that_is_positive_or_nan_marks_nothing(threshold: float) -> None:
    """Whatever a call finds on the device; what was marked before stays so."""
    pair = Pair(*make_qkv(1, 2, 50, 96, 32))
    run(pair, [make_now()] * 2, threshold=threshold)
    assert not pair.marks().any()
    pair.call(make_now())
    marks = pair.marks()
    assert marks.any()
    pair.call(make_now(), threshold=threshold)
    assert torch.equal(pair.marks(), marks)


def test_the_threshold_is_one_element_of_many() -> None:
    """As in a compiled graph, where it lies at any address."""
    pair = Pair(*make_qkv(1, 2, 50, 96, 32))
    pair.call(make_now(), threshold=torch.tensor([-math.inf, THRESHOLD, 0.0])[1])
    marks = pair.marks()
    assert marks.any()
    other = Pair(*make_qkv(1, 2, 50, 96, 32))
    other.call(make_now())
    assert torch.equal(marks, other.marks())


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
    attend_triton(q, k, v, state, make_now(), 0.2, torch.tensor(0.0), TILE, out)
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


def padding_bias(kind: str, batch: int, k_len: int) -> Tensor:
    """float32 `[batch, k_len]`; only the last batch entry is padded."""
    bias = torch.zeros(batch, k_len)
    bias[-1, k_len // 3 :] = {"infinite": -math.inf, "lowest": torch.finfo(torch.float32).min, "finite": -10000}[kind]
    return bias


@pytest.mark.parametrize("kind", ["infinite", "lowest", "finite"])
@pytest.mark.parametrize("k_len", [96, 150])
def test_key_bias_follows_the_reference(kind: str, k_len: int) -> None:
    pair = Pair(*make_qkv(2, 2, 70, k_len, 32), key_bias=padding_bias(kind, 2, k_len))
    run(pair, [make_now()] * 3)
    assert pair.marks()[1, ..., k_len // 2 // TILE.k :].all()


def test_key_bias_may_be_shared_and_strided() -> None:
    bias = torch.randn(150, 1, generator=torch.Generator().manual_seed(0)).expand(150, 3)[:, :1].T
    run(Pair(*make_qkv(2, 1, 70, 150, 32), key_bias=bias), [make_now()] * 2)


def test_the_decision_is_about_biased_scores() -> None:
    q, k, v = (torch.ones(1, 1, length, 16) for length in (32, 64, 64))
    bias = torch.zeros(1, 64)
    bias[0, 16:32] = -8.0
    for below, expected in ((7.9, [False, True, False, False]), (8.1, [False] * 4)):
        pair = Pair(q, k, v, key_bias=bias)
        pair.call(make_now(), threshold=-below * LOG2_E)
        assert pair.marks().flatten().tolist() == expected


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_a_batch_entry_without_keys(lowest: float) -> None:
    """Minus infinity leaves nothing to attend to; what is finite leaves the mean of all, at every call."""
    q, k, v = make_qkv(2, 1, 40, 50, 16)
    bias = torch.zeros(2, 50)
    bias[1] = lowest
    state = torch.zeros(state_shape(1, 2, 1, 40, 50, TILE), dtype=torch.int32)
    out, lse = torch.empty_like(q), torch.empty(2, 1, 40)
    for _ in range(3):
        attend_triton(q, k, v, state, make_now(), 0.25, torch.tensor(-4.0), TILE, out, lse, bias)
    if lowest == -math.inf:
        assert not out[1].any()
        assert (lse[1] == -math.inf).all()
    else:
        torch.testing.assert_close(out[1], v[1].mean(1, keepdim=True).expand_as(out[1]))
    assert out[0].isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_share_key_heads(kv_heads: int) -> None:
    q, k, v = make_qkv(2, 4, 70, 96, 16)
    pair = Pair(q, k[:, :kv_heads], v[:, :kv_heads])
    run(pair, [make_now()] * 2)
    assert pair.marks().any()


@pytest.mark.parametrize("protected", [(0, 20), (130, 150), (0, 1, 32, 33, 70, 70, 140, 9999)], ids=str)
def test_protected_tiles_are_never_marked(protected: tuple[int, ...]) -> None:
    pair = Pair(*make_qkv(1, 1, 150, 150, 32), protected=protected)
    run(pair, [make_now()] * 3)
    rows, keys = touched_tiles(5, TILE.q, protected), touched_tiles(10, TILE.k, protected)
    marks = pair.marks()
    assert marks.any()
    assert not marks[:, :, rows].any()
    assert not marks[..., keys].any()


def test_protected_tiles_are_computed_though_the_state_marks_everything() -> None:
    pair = Pair(*make_qkv(1, 2, 150, 150, 32), protected=(40, 50))
    for state in (pair.state, pair.expected_state):
        state[..., 0] = 7
        state[..., row_layout(10).mask_start :] = 1023
    out, lse = torch.empty_like(pair.q), torch.empty(1, 2, 150)
    attend_triton(pair.q, pair.k, pair.v, pair.state, make_now(), 0.2, THRESHOLD, TILE, out, lse, None, (40, 50))
    exact = [x.double() for x in (pair.q, pair.k, pair.v)]
    expected, _ = attend_reference(*exact, pair.expected_state, make_now(), 0.2, THRESHOLD, TILE, None, (40, 50))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pair.state, pair.expected_state)
    assert pair.state[0, 0, 0, :, 1].tolist() == [2, 10, 2, 2, 2]


def kinds_of_tiles(numbers: Sequence[int], k_len: int, tile: TileShape) -> tuple[Tensor, Tensor]:
    """int8 kinds of the key tiles, and the bias that hides the keys of those that are hidden."""
    kinds = torch.tensor(numbers, dtype=torch.int8)
    hidden = (kinds == HIDDEN_TILE).repeat_interleave(tile.k)[:k_len]
    return kinds, torch.zeros(1, k_len).masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("protected", [(), (0, 20)], ids=str)
@pytest.mark.parametrize("slot", [0, -1])
def test_kinds_of_key_tiles_follow_the_reference(slot: int, protected: tuple[int, ...]) -> None:
    kinds, bias = kinds_of_tiles([2, 0, 1, 2, 0, 0, 1, 0, 2, 2], 150, TILE)
    pair = Pair(*make_qkv(1, 2, 150, 150, 32), key_bias=bias, protected=protected, kinds=kinds)
    run(pair, [make_now(slot=slot)] * 3)
    if slot == 0:
        assert not pair.marks()[..., kinds == COMPUTED_TILE].any()
        assert pair.marks()[..., kinds == FREE_TILE].any()
        assert int(pair.state[..., 1].max()) == 6


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), heads_per_kv=st.integers(1, 2), q_len=st.integers(1, 90),
    k_len=st.integers(1, 90), dim=st.sampled_from([16, 24, 40, 64]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    tile=st.sampled_from([TileShape(16, 16), TILE, TileShape(64, 32)]),
    strided=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    scale=st.sampled_from([-0.5, 0.0, 0.125, 0.25, 1.0]), below=st.sampled_from([math.inf, 12, 3, 0]),
    bias=st.sampled_from([None, "infinite", "lowest", "finite"]), protected=st.lists(st.integers(0, 99), max_size=8),
    seed=st.integers(0, 9), numbers=st.none() | st.lists(st.integers(0, 2), min_size=6, max_size=6),
)  # fmt: skip
def test_any_shape_dtype_stride_and_scale(
    batch: int, kv_heads: int, heads_per_kv: int, q_len: int, k_len: int, dim: int, dtype: torch.dtype, tile: TileShape,
    strided: tuple[bool, bool, bool], scale: float, below: float, bias: str | None, protected: list[int], seed: int,
    numbers: list[int] | None,
) -> None:  # fmt: skip
    """Small integers and scales that are powers of two: scores are exact, so states agree word for word.

    The threshold lies half way between `below` and the next possible difference of two scores.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    shapes = ((kv_heads * heads_per_kv, q_len), (kv_heads, k_len), (kv_heads, k_len))
    for (heads, length), is_strided in zip(shapes, strided, strict=True):
        x = torch.randint(-2, 3, (batch, heads, length, dim), generator=generator).to(dtype)
        tensors.append(x.transpose(1, 2).contiguous().transpose(1, 2) if is_strided else x)
    threshold = -(below + 0.5) * abs(scale) * LOG2_E if scale else -below
    key_bias = None if bias is None else padding_bias(bias, batch, k_len)
    ranges = sorted(protected[: len(protected) // 2 * 2])
    kinds = None
    if numbers is not None:
        kinds, hiding = kinds_of_tiles([0, *numbers[1 : tile_count(k_len, tile.k)]], k_len, tile)
        key_bias = hiding if key_bias is None else key_bias + hiding
    pair = Pair(*tensors, tile=tile, key_bias=key_bias, protected=ranges, kinds=kinds)
    run(pair, [make_now()] * 2, scale=scale, threshold=threshold)


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
