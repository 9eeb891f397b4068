"""Queries and keys in 8 bits on a real GPU: exact up to the rounding, marks included, and what the rounding costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_kernels import KERNELS
from models import OPTIONS, denoise, noise, prompt, tiny_wan
from test_attend_cuda import make
from torch import Tensor

import lite_compile
from lite_compile.kernels.quantize_qk import quantize
from lite_compile.kernels.select_kernel import Kernel, select_kernel
from lite_compile.ops import CRITERIA, attend_reference
from lite_compile.skip_state import row_layout, state_shape, tile_count, unpack_bits

HOPPER_ONLY = KERNELS[-1].marks  # type: ignore[attr-defined]
pytestmark = [pytest.mark.gpu, *HOPPER_ONLY]

NAMES = ["int8", "fp8"]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as diffusers lays them out; keys have channels in common, as those of real models."""
    batch, heads, q_len, k_len, dim = shape
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, heads, dim, device="cuda", generator=generator) for length in (q_len, k_len, k_len)
    )
    k = k + 8 * torch.randn(dim, device="cuda", generator=generator)
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)]


def attend(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    kernel = select_kernel(q.device, q.dtype, q.shape[-1], qk_dtype=name)
    assert isinstance(kernel, Kernel), kernel
    assert kernel.name == f"hopper-{name}"
    shape = state_shape(1, q.shape[0], q.shape[1], q.shape[2], k.shape[2], kernel.tile)
    state = torch.zeros(shape, dtype=torch.int32, device="cuda")
    now = torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32, device="cuda")
    threshold = torch.tensor(-1000.0, device="cuda")
    scale = q.shape[-1] ** -0.5
    out: Tensor = torch.ops.lite_compile.attend(
        q, k, v, state, now, scale, threshold, *kernel.tile, kernel_name=kernel.name
    )[0]
    return out


def rounded(x: Tensor, name: str, rows: int, center: bool) -> Tensor:
    """What the kernel takes for `x`, in float64."""
    quantized, scales = quantize(x, name, rows, x.shape[-1], center)
    return quantized.double() * scales.double().repeat_interleave(rows, 2)[:, :, : x.shape[2], None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2, 512, 512, 64), (2, 3, 1000, 700, 128), (1, 2, 333, 777, 128), (1, 2, 400, 8400, 128)], ids=str
)
@pytest.mark.parametrize("rising", [False, True])
def test_the_rounding_is_all_that_is_lost(shape: tuple[int, ...], dtype: torch.dtype, name: str, rising: bool) -> None:
    """`rising`: late keys have scores far above the others."""
    q, k, v = inputs(shape, dtype)
    if rising:
        k[:, :, -200:-100] += 10 * (k[:, :, -200:-100] - k.mean(2, keepdim=True))
    columns = shape[-1]
    assert columns in (64, 128), "what `rounded` takes for the columns of the kernel"
    scores = rounded(q, name, 64, False) @ rounded(k, name, 128, True).mT * columns**-0.5
    expected = scores.softmax(-1) @ v.double()
    plain = q.double() @ k.double().mT * columns**-0.5
    exact = plain.softmax(-1) @ v.double()
    dense = (F.scaled_dot_product_attention(q, k, v).double() - exact).norm()
    out = attend(q, k, v, name).double()
    # fp8 products are summed in less than float32 by the tensor cores.
    assert (out - expected).norm() <= (2 if name == "int8" else 6) * dense
    if rising:  # where softmax is so sharp, rounding scores matters more
        return
    assert (out - exact).norm() < (0.03 if name == "int8" else 0.08) * exact.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("k_len", "dim"), [(8400, 128), (8448, 128), (8400, 64), (1536, 128)])
@pytest.mark.parametrize("rising", [False, True])
def test_states_are_those_of_the_rounded(
    k_len: int, dim: int, dtype: torch.dtype, criterion: str, name: str, rising: bool
) -> None:
    """Marks and anchors, twice, but for tiles within rounding of the threshold, which are counted."""
    q, k, v = make((1, 2, 2304, k_len, dim), dtype, sharpness=4.0)
    if rising:
        k[:, :, -200:-100] += 30 * (k[:, :, -200:-100] - k.mean(2, keepdim=True))
    kernel = select_kernel(q.device, dtype, dim, qk_dtype=name)
    assert isinstance(kernel, Kernel), kernel
    taken = [rounded(q, name, 64, False).float().cpu(), rounded(k, name, 128, True).float().cpu(), v.float().cpu()]
    now, threshold = torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32), torch.tensor(-5.0)
    expected = torch.zeros(state_shape(1, 1, 2, 2304, k_len, kernel.tile), dtype=torch.int32)
    k_tiles = tile_count(k_len, kernel.tile.k)
    layout, marked = row_layout(k_tiles), 0.0
    for _ in range(2):
        state = expected.cuda()
        torch.ops.lite_compile.attend(
            q, k, v, state, now.cuda(), dim**-0.5, threshold.cuda(), *kernel.tile, criterion=criterion,
            kernel_name=kernel.name,
        )  # fmt: skip
        attend_reference(*taken, expected, now, dim**-0.5, threshold, kernel.tile, criterion=criterion)
        for first, count in ((layout.mask_start, k_tiles), (layout.anchor_start, 32 * layout.anchor_words)):
            ours, theirs = (unpack_bits(s[..., first:].cpu(), count) for s in (state, expected))
            # fp8 products are summed in less than float32 by the tensor cores.
            assert (ours != theirs).sum() <= (0.003 if name == "int8" else 0.02) * ours.numel()
            marked = max(marked, float(theirs.float().mean()) if first == layout.mask_start else 0.0)
    assert marked > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_with_it(name: str) -> None:
    options = {**OPTIONS, "inner": "inductor", "qk_dtype": name}
    model = tiny_wan().to(torch.bfloat16)
    start, prompts = noise(0).to(torch.bfloat16), [prompt(0).to(torch.bfloat16)]
    lite_compile.clear_report()
    result = denoise(torch.compile(model, backend="liteattention", options=options), start, prompts, 6)
    assert {site.kernel for site in lite_compile.report().rewritten} == {f"hopper-{name}"}
    expected = denoise(tiny_wan().to(torch.bfloat16), start, prompts, 6)
    assert lite_compile.stats(model).density < 1
    assert (result - expected).norm() < 0.2 * expected.norm()
