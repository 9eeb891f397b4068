"""The op itself: its schema, its fake, what it mutates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_compile.ops import CRITERIA, attend_reference, touched_tiles
from lite_compile.skip_state import TileShape, pack_bits, row_layout, state_shape, tile_count, unpack_bits

TILE = TileShape(64, 32)
MINUS_ONE = torch.tensor(-1.0)
KINDS = torch.tensor([0, 1, 2, 0], dtype=torch.int8)


def arguments(dtype: torch.dtype = torch.float32, k_len: int = 100) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q = torch.randn(2, 70, 3, 16, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, k_len, 3, 16, dtype=dtype).transpose(1, 2) for _ in range(2))
    state = torch.zeros(state_shape(2, 2, 3, 70, k_len, TILE), dtype=torch.int32)
    now = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)
    return q, k, v, state, now


@pytest.mark.parametrize(
    ("dtype", "heads_last", "return_lse"),
    list(itertools.product((torch.float32, torch.bfloat16, torch.float16), (True, False), (True, False))),
)
def test_opcheck(dtype: torch.dtype, heads_last: bool, return_lse: bool) -> None:
    q, k, v, state, now = arguments(dtype)
    torch.library.opcheck(
        torch.ops.lite_compile.attend.default,
        (q, k, v, state, now, 0.25, MINUS_ONE, TILE.q, TILE.k, heads_last, return_lse),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("bias_batch", [1, 2])
@pytest.mark.parametrize("protected", [(), (0, 8, 60, 100)], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_opcheck_of_the_optional_arguments(bias_batch: int, protected: tuple[int, ...], criterion: str) -> None:
    q, k, v, state, now = arguments()
    torch.library.opcheck(
        torch.ops.lite_compile.attend.default,
        (q, k[:, :1], v[:, :1], state, now, 0.25, MINUS_ONE, TILE.q, TILE.k),
        {"key_bias": torch.randn(bias_batch, 100), "protected": protected, "criterion": criterion, "key_tiles": KINDS},
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias_batch", [0, 1, 2])
def test_reference_is_dense_attention_where_nothing_is_skipped(kv_heads: int, bias_batch: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 70, 16, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, 90, 16, dtype=torch.float64) for _ in range(2))
    bias = None
    if bias_batch:
        bias = torch.randn(bias_batch, 90)
        bias[-1, 7:40] = -math.inf
    state = torch.zeros(state_shape(1, 2, 4, 70, 90, TILE), dtype=torch.int32)
    now = torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32)
    out, lse = attend_reference(q, k, v, state, now, 0.3, torch.tensor(-4.0), TILE, bias)
    mask = None if bias is None else bias.double()[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    scores = q @ k.repeat_interleave(4 // kv_heads, 1).mT * 0.3 + (0 if mask is None else mask)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("protected", "expected"),
    [
        ((), [0, 0, 0, 0]),
        ((0, 1), [1, 0, 0, 0]),
        ((31, 33), [1, 1, 0, 0]),
        ((32, 64), [0, 1, 0, 0]),
        ((40, 40), [0, 0, 0, 0]),
        ((0, 2, 96, 400), [1, 0, 0, 1]),
    ],
    ids=str,
)
def test_tiles_that_touch_a_range(protected: tuple[int, ...], expected: list[int]) -> None:
    assert touched_tiles(4, 32, protected).tolist() == list(map(bool, expected))


def test_layout_of_the_output() -> None:
    q, k, v, state, now = arguments()
    for heads_last in (True, False):
        out, lse = torch.ops.lite_compile.attend(q, k, v, state, now, 0.25, MINUS_ONE, TILE.q, TILE.k, heads_last)
        assert out.is_contiguous() != heads_last
        assert out.transpose(1, 2).is_contiguous() == heads_last
        assert lse.numel() == 0


def test_lse_is_the_log_of_the_sum_of_exponentials() -> None:
    q, k, v, state, now = arguments()
    _, lse = torch.ops.lite_compile.attend(q, k, v, state, now, 0.25, MINUS_ONE, TILE.q, TILE.k, True, True)
    expected = torch.logsumexp(q.double() @ k.double().transpose(-1, -2) * 0.25, -1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_refused() -> None:
    q, k, v, state, now = arguments()
    bias = torch.zeros(1, 100)
    for x in (q, bias):
        x.requires_grad_()
        with pytest.raises(RuntimeError, match="no backward"):
            torch.ops.lite_compile.attend(q, k, v, state, now, 0.25, MINUS_ONE, TILE.q, TILE.k, key_bias=bias)
        x.requires_grad_(False)
    assert not state.any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda q: q[0]),
        ("k", lambda k: k[:, :2]),
        ("q", lambda q: q[:, :2]),
        ("k", lambda k: k[..., :8]),
        ("v", lambda v: v[:, :, :50]),
        ("v", lambda v: v.half()),
        ("q", lambda q: q[:0]),
        ("q", lambda q: q.long()),
        ("state", lambda state: state[:, :1]),
        ("state", lambda state: state[0]),
        ("state", lambda state: state.long()),
        ("state", lambda state: state.transpose(0, 1).contiguous().transpose(0, 1)),
        ("now", lambda now: now[:3]),
        ("now", lambda now: now.long()),
    ],
)
def test_wrong_shapes_and_dtypes_raise_before_anything_is_touched(
    name: str, change: Callable[[Tensor], Tensor]
) -> None:
    given = dict(zip(("q", "k", "v", "state", "now"), arguments(), strict=True))
    state = given["state"]
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=r"allowed|agree"):
        torch.ops.lite_compile.attend(*given.values(), 0.25, MINUS_ONE, TILE.q, TILE.k)
    assert not state.any()


@pytest.mark.parametrize(
    ("threshold", "tile", "named"),
    [
        (torch.tensor(-1.0).double(), TILE, "threshold"),
        (torch.tensor(-1), TILE, "threshold"),
        (torch.tensor([-1.0, -1.0]), TILE, "threshold"),
        (torch.zeros(0), TILE, "threshold"),
        (torch.tensor(-1.0, device="meta"), TILE, "threshold"),
        (MINUS_ONE, (0, 32), "tile"),
        (MINUS_ONE, (64, -32), "tile"),
    ],
)
def test_wrong_numbers_raise(threshold: Tensor, tile: tuple[int, int], named: str) -> None:
    for context in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with context, pytest.raises(ValueError, match=rf"{named} is .*allowed"):
            torch.ops.lite_compile.attend(*arguments(), 0.25, threshold, *tile)


@pytest.mark.parametrize("protected", [(3,), (-1, 4), (8, 4), (0, 8, 7, 9), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)], ids=str)
def test_wrong_ranges_raise(protected: tuple[int, ...]) -> None:
    for context in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with context, pytest.raises(ValueError, match=r"protected is .*allowed"):
            torch.ops.lite_compile.attend(*arguments(), 0.25, MINUS_ONE, *TILE, protected=protected)


def test_an_unknown_criterion_is_named() -> None:
    with pytest.raises(ValueError, match="criterion is 'mas'; allowed: 'max', 'mass'"):
        torch.ops.lite_compile.attend(*arguments(), 0.25, MINUS_ONE, *TILE, criterion="mas")


@pytest.mark.parametrize("bias", [torch.zeros(2, 100).double(), torch.zeros(2, 1, 1, 100)], ids=["dtype", "rank"])
def test_wrong_kinds_of_bias_raise(bias: Tensor) -> None:
    for context in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with context, pytest.raises(ValueError, match=r"key_bias is .*allowed"):
            torch.ops.lite_compile.attend(*arguments(), 0.25, MINUS_ONE, *TILE, key_bias=bias)


@pytest.mark.parametrize("shape", [(3, 100), (2, 70), (0, 100)], ids=str)
def test_wrong_shapes_of_bias_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"key_bias is .*allowed"):
        torch.ops.lite_compile.attend(*arguments(), 0.25, MINUS_ONE, *TILE, key_bias=torch.zeros(shape))


def test_wrong_kinds_of_tiles_raise() -> None:
    for wrong in (KINDS.int(), KINDS[None], KINDS[:3], KINDS.repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"key_tiles is .*allowed"):
            torch.ops.lite_compile.attend(*arguments(), 0.25, MINUS_ONE, *TILE, key_tiles=wrong)


def test_wrong_kinds_raise_while_tracing() -> None:
    q, k, v, state, now = arguments()
    for wrong in ((q.long(), k, v, state, now), (q, k, v, state[0], now), (q, k, v, state, now.long())):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="allowed"):
            torch.ops.lite_compile.attend(*wrong, 0.25, MINUS_ONE, *TILE)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_bits_survive_packing(count: int) -> None:
    bits = torch.rand(5, count, generator=torch.Generator().manual_seed(count)) > 0.5
    words = pack_bits(bits, tile_count(count, 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, count), bits)


@pytest.mark.parametrize("k_tiles", [1, 32, 33, 128, 129, 591, 5000])
def test_row_layout_covers_all_tiles(k_tiles: int) -> None:
    layout = row_layout(k_tiles)
    assert layout.mask_words * 32 >= k_tiles
    assert layout.anchor_words * 32 * layout.anchor_group >= k_tiles
    assert layout.words == 2 + layout.anchor_words + layout.mask_words
