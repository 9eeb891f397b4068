"""Long rows in bfloat16, whose weights are relative to a shift that is fixed at the first tile: what exceeds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu_kernels import KERNELS
from test_attend_cuda import attend, exact, new_state
from torch import Tensor

from lite_compile.ops import CRITERIA, attend_reference
from lite_compile.skip_state import row_layout, tile_count, unpack_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HEADS, Q_LEN = 2, 500
THRESHOLD = -5.0


def stay(q: Tensor, k: Tensor, v: Tensor) -> None:
    pass


def rise_slowly(q: Tensor, k: Tensor, v: Tensor) -> None:
    k *= (300 ** torch.linspace(0, 1, k.shape[2], device="cuda"))[:, None]


def rise_late(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:, :, -300:-100] *= 100


def rise_in_one_row(q: Tensor, k: Tensor, v: Tensor) -> None:
    q[:, :, 100] *= 300


def rise_everywhere(q: Tensor, k: Tensor, v: Tensor) -> None:
    q *= 40


def begin_with_nothing(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The first half of the keys has scores of -inf, which are products too large for float32; the others are low."""
    q[..., 0] = 1e3
    k[..., 0] = -4.0
    k[:, :, : k.shape[2] // 2, 0] = -3e38


def take_small_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    v *= 2.0**-60


def inputs(change: Callable[[Tensor, Tensor, Tensor], None], k_len: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, length, HEADS, dim, device="cuda", generator=generator).transpose(1, 2)
        for length in (Q_LEN, k_len, k_len)
    )
    change(q, k, v)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("k_len", "dim"), [(8320, 128), (8500, 128), (8500, 96), (8500, 64)])
@pytest.mark.parametrize(
    "change",
    [stay, rise_slowly, rise_late, rise_in_one_row, rise_everywhere, begin_with_nothing, take_small_values],
    ids=lambda change: change.__name__,
)
def test_scores_that_rise(change: Callable[[Tensor, Tensor, Tensor], None], k_len: int, dim: int, kernel: str) -> None:
    q, k, v = inputs(change, k_len, dim)
    expected, expected_lse = exact(q, k, v, dim**-0.5)
    dense = (F.scaled_dot_product_attention(q, k, v).double() - expected).norm()
    state, _ = new_state(q, k, kernel)
    out, lse = attend(q, k, v, state, 1, -float("inf"), dim**-0.5, lse=True, kernel=kernel)
    assert (out.double() - expected).norm() <= 2 * dense + 1e-6 * expected.norm()
    assert ((lse.double() - expected_lse).abs() <= 1e-4 + 1e-6 * expected_lse.abs()).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    "change",
    [stay, rise_slowly, rise_late, rise_in_one_row, begin_with_nothing],
    ids=lambda change: change.__name__,
)
def test_states_of_scores_that_rise(
    change: Callable[[Tensor, Tensor, Tensor], None], criterion: str, kernel: str
) -> None:
    """Marks and anchors are the reference's, but for tiles within rounding of the threshold, which are counted."""
    q, k, v = inputs(change, 8500, 128)
    state, tile = new_state(q, k, kernel)
    expected, k_tiles = state.cpu(), tile_count(k.shape[2], tile.k)
    layout, now = row_layout(k_tiles), torch.tensor([7, 0, 1, 1, 0], dtype=torch.int32)
    given = [x.float().cpu() for x in (q, k, v)]
    marked = 0
    for _ in range(2):
        attend(q, k, v, state, 1, THRESHOLD, 128**-0.5, kernel=kernel, criterion=criterion)
        limit = torch.tensor(THRESHOLD)
        attend_reference(*given, expected, now, 128**-0.5, limit, tile, criterion=criterion)
        for first, count in ((layout.mask_start, k_tiles), (layout.anchor_start, 32 * layout.anchor_words)):
            ours, theirs = (unpack_bits(s[1, ..., first:].cpu(), count) for s in (state, expected))
            assert (ours != theirs).sum() <= 0.003 * ours.numel()
            marked += int(theirs.sum()) if first == layout.mask_start else 0
        expected.copy_(state.cpu())
    assert (marked > 0) is (change not in (stay, rise_in_one_row))  # these leave nearly all scores random


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_with_a_nan_are_nan_and_skip_nothing(kernel: str) -> None:
    q, k, v = inputs(stay, 8500, 128)
    q[0, 1, 300] = float("nan")
    state, tile = new_state(q, k, kernel)
    layout = row_layout(tile_count(k.shape[2], tile.k))
    out, _ = attend(q, k, v, state, 1, 0.0, 128**-0.5, kernel=kernel)
    rows = out.isnan().any(-1).nonzero().tolist()
    assert rows == [[0, 1, 300]]
    skipped = state[1, 0, :, :, layout.mask_start :].any(-1)
    assert not skipped[1, 300 // tile.q]
    assert skipped[0].any()
