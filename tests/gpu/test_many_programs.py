"""Workers of the Hopper kernel take many tiles of queries one after the other: nothing of one may reach the next."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_kernels import KERNELS
from torch import Tensor

from lite_compile.kernels.quantize_qk import quantize
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.skip_state import COMPUTED_WORD, EPOCH_WORD, TileShape, pack_bits, row_layout, state_shape, tile_count

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EPOCH = 7
HIDDEN_KEYS = 300
IN_8_BITS = [pytest.param(f"hopper-{name}", marks=KERNELS[-1].marks) for name in ("int8", "fp8")]  # type: ignore[attr-defined]


def uneven_state(q: Tensor, tile: TileShape) -> tuple[Tensor, Tensor]:
    """A state whose rows keep all, some or none of their tiles by turns; what is skipped, bool `[B, H, qt, kt]`."""
    batch, heads, length, _ = q.shape
    k_tiles = tile_count(length, tile.k)
    layout = row_layout(k_tiles)
    state = torch.zeros(state_shape(1, batch, heads, length, length, tile), dtype=torch.int32, device="cuda")
    kept = torch.tensor([0, 1, 2, 3, k_tiles // 2, k_tiles - 1, k_tiles, 1, 0], device="cuda").clamp(0, k_tiles)
    row = torch.arange(state[0, ..., 0].numel(), device="cuda").view(state.shape[1:4])
    order = torch.rand(*row.shape, k_tiles, device="cuda").argsort(-1).argsort(-1)
    skipped = order >= kept[row % len(kept)][..., None]
    state[0, ..., EPOCH_WORD] = EPOCH
    state[0, ..., layout.mask_start :] = pack_bits(skipped, layout.mask_words)
    return state, skipped


def exact(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and LSE of one head, `[S, D]`, in float64 over the keys to keep, bool `[S, S]`; else 0 and -inf."""
    scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~keep, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)


def rounded(x: Tensor, name: str, rows: int, center: bool) -> Tensor:
    """What the kernel takes for `x` `[B, H, S, 64 or 128]` if its products are of 8 bits, in float64."""
    quantized, scales = quantize(x, name, rows, x.shape[-1], center)
    return quantized.double() * scales.double().repeat_interleave(rows, 2)[:, :, : x.shape[2], None]


@pytest.mark.parametrize("kernel", [*KERNELS, *IN_8_BITS])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 2500), (1, 7, 8320), (1, 1, 100)], ids=["many", "queued, even", "few"])
def test_rows_that_visit_all_some_or_no_tiles(shape: tuple[int, int, int], biased: bool, dim: int, kernel: str) -> None:
    """With a bias the last keys are hidden. Without one the state stays, and so do the results, bit for bit."""
    batch, heads, length = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    wanted, _, qk_dtype = kernel.partition("-")
    chosen = select_kernel(q.device, q.dtype, dim, wanted, qk_dtype=qk_dtype or None)
    assert isinstance(chosen, Kernel)
    assert chosen.name == kernel
    tile = chosen.tile
    state, skipped = uneven_state(q, tile)
    before = state.clone()
    hidden = torch.arange(length, device="cuda") >= (length - HIDDEN_KEYS if biased else length)
    key_bias = torch.zeros(batch, length, device="cuda").masked_fill(hidden, -math.inf) if biased else None
    now = torch.tensor([EPOCH, EPOCH, 0, 1, 0], dtype=torch.int32, device="cuda")
    marks_nothing = torch.tensor(-math.inf, device="cuda")

    def call() -> tuple[Tensor, Tensor]:
        given = (q, k, v, state, now, dim**-0.5, marks_nothing, *tile, True, True, key_bias, (), kernel)
        out, lse = torch.ops.lite_compile.attend(*given)
        return out, lse

    out, lse = call()
    q_taken, k_taken = (rounded(q, qk_dtype, 64, False), rounded(k, qk_dtype, tile.k, True)) if qk_dtype else (q, k)
    # fp8 products are summed in less than float32 by the tensor cores.
    bound, lse_bound = {"": (4e-3, 2e-3), "int8": (6e-3, 2e-3), "fp8": (2e-2, 1e-2)}[qk_dtype]
    assert torch.equal(state[0, ..., COMPUTED_WORD], (~skipped).sum(-1).int())
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        keep = ~skipped[b, h].repeat_interleave(tile.k, 1)[:, :length].repeat_interleave(tile.q, 0)[:length] & ~hidden
        expected, expected_lse = exact(q_taken[b, h], k_taken[b, h], v[b, h], keep)
        assert (out[b, h].double() - expected).norm() <= bound * expected.norm()
        finite = expected_lse.isfinite()
        assert torch.equal(lse[b, h].isfinite(), finite)
        assert torch.allclose(lse[b, h][finite].double(), expected_lse[finite], rtol=0, atol=lse_bound)
    if not biased:
        start = row_layout(tile_count(length, tile.k)).mask_start
        assert torch.equal(state[..., start:], before[..., start:])
        anchored = call()  # in the order of the anchors that the first one noted
        for _ in range(5):
            assert all(map(torch.equal, call(), anchored))
