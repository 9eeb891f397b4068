"""Residual, layer norm and modulation as one kernel on a real GPU: the ops beside the CPU's, and in compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import OPTIONS, TOLERANCE, denoise, noise, prompt, tiny_wan
from norm_models import BF16, FP16, FP32, arguments, blocks, gated_affine
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import lite_compile
from lite_compile.layer_norm_op import add_normalize, add_normalize_cpu, normalize, normalize_cpu
from lite_compile.passes import fuse_layer_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-6


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def assert_rounded_alike(found: Tensor, wanted: Tensor) -> None:
    """float32 closely; half precision but for what lies in the middle of two of its numbers."""
    assert found.is_contiguous()
    assert found.dtype is wanted.dtype
    assert found.shape == wanted.shape
    epsilon = 1e-5 if wanted.dtype is FP32 else torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(found.cpu(), wanted, rtol=epsilon, atol=1e-5)


def on_gpu(values: Any) -> Any:
    return [x.cuda() if isinstance(x, Tensor) else x for x in values]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("dim", [1, 100, 1536, 2048, 3072, 5120, 1 << 14])
@pytest.mark.parametrize("table_batch", [1, 2])
@pytest.mark.parametrize("same", [False, True], ids=["modulated in float32", "modulated in x's dtype"])
def test_the_kernel_computes_what_the_ops_say(dtype: torch.dtype, dim: int, table_batch: int, same: bool) -> None:
    args = arguments(dtype, dtype if same else FP32, table_batch=table_batch, tokens=37, dim=dim)
    gate, weight, bias, scale, shift = args.gate, args.weight, args.bias, args.scale, args.shift
    for vectors in (
        (None, None, None, None, None),
        (gate, weight, bias, None, None),
        (None, None, None, scale, shift),
        (gate, None, bias, scale, None),
        (gate, weight, bias, scale, shift),
    ):
        # The norm is compared for the same sum: two sums may be rounded to different sides.
        total, normed = add_normalize(*on_gpu((args.x, args.y, *vectors)), EPS)
        assert_rounded_alike(total, add_normalize_cpu(args.x, args.y, *vectors, EPS)[0])
        assert_rounded_alike(normed, normalize_cpu(total.cpu(), *vectors[1:], EPS))
        found = normalize(*on_gpu((args.x, *vectors[1:])), EPS)
        assert_rounded_alike(found, normalize_cpu(args.x, *vectors[1:], EPS))


def test_inputs_in_any_layout() -> None:
    x, y, gate, scale, shift, weight, bias = on_gpu(arguments(BF16))
    expected = add_normalize(x, y, gate, weight, bias, scale, shift, EPS)
    strided = [tensor.mT.contiguous().mT for tensor in (x, y)]
    doubled = [torch.stack((vector, vector), -1)[..., 0] for vector in (gate, weight, bias, scale, shift)]
    for found, wanted in zip(add_normalize(*strided, *doubled, EPS), expected, strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, wanted)


def test_they_are_sound_operators() -> None:
    x, y, gate, scale, shift, weight, bias = on_gpu(arguments(BF16))
    torch.library.opcheck(add_normalize, (x, y, gate, weight, bias, scale, shift, EPS))
    torch.library.opcheck(normalize, (x, None, None, scale, shift, EPS))


def test_more_than_2_to_the_31_elements() -> None:
    """The last tokens of a batch whose offsets do not fit into 32 bits."""
    tokens, dim = (1 << 20) + 3, 2048
    if torch.cuda.mem_get_info()[0] < 5 * tokens * dim * 2:
        pytest.skip("needs 22 GB of GPU memory")
    x = torch.zeros(1, tokens, dim, dtype=BF16, device="cuda")
    y = torch.zeros_like(x)
    given = arguments(BF16, batch=1, table_batch=1, tokens=3, dim=dim)
    x[:, -3:], y[:, -3:] = given.x.cuda(), given.y.cuda()
    total, normed = add_normalize(x, y, *on_gpu((given.gate, None, None, given.scale, given.shift)), EPS)
    wanted = add_normalize_cpu(given.x, given.y, given.gate, None, None, given.scale, given.shift, EPS)
    assert_rounded_alike(total[:, -3:].contiguous(), wanted[0])
    again = normalize_cpu(total[:, -3:].cpu(), None, None, given.scale, given.shift, EPS)
    assert_rounded_alike(normed[:, -3:].contiguous(), again)
    assert not total[:, :-3].any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("function", "times"), [(gated_affine, 1), (blocks, 9)])
def test_inductor_launches_the_kernel(function: Any, times: int, dtype: torch.dtype, dynamic: bool) -> None:
    from torch._inductor.compile_fx import compile_fx

    counts: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        counts.append(fuse_layer_norm.fuse_layer_norm(gm, torch.device("cuda", 0), least_elements=0))
        gm.recompile()
        return compile_fx(gm, example_inputs)

    run = torch.compile(function, backend=backend, fullgraph=True)
    for tokens in (64, 96, 1000) if dynamic else (64,):
        args = on_gpu(arguments(dtype, tokens=tokens, dim=256))
        if dynamic:
            for marked in args[:2]:
                torch._dynamo.mark_dynamic(marked, 1)
        with torch.no_grad():
            result, expected = run(*args), function(*args)
        for found, wanted in zip(*((x,) if isinstance(x, Tensor) else x for x in (result, expected)), strict=True):
            assert (found.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()
    assert counts == [times]


def kernels_of(run: Any, steps: int = 2) -> int:
    """How many times our kernel was launched in so many steps."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        denoise(run, noise(5), [prompt(5)], steps)
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if "add_normalize_kernel" in event.key)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_backend_fuses_all_norms_of_wan(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_layer_norm, "LEAST_ELEMENTS", 0)
    results = []
    for fuse in (True, False):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_wan()
        given = {**OPTIONS, "inner": "inductor", "mode": mode, "fuse_layer_norm": fuse, "threshold": float("-inf")}
        compiled = torch.compile(model, backend="liteattention", fullgraph=True, options=given)

        def run(**kwargs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return tuple(x.clone() for x in compiled(**kwargs))  # noqa: B023

        results.append(denoise(run, noise(0), [prompt(0), prompt(9)], 4))
        assert counters["stats"]["unique_graphs"] == 1
        if mode == "reduce-overhead":
            assert counters["inductor"]["cudagraph_skips"] == 0
        assert kernels_of(run) == (2 * 7 if fuse else 0)
        assert lite_compile.stats(model).density == 1
    fused, plain = results
    assert (fused - plain).norm() < TOLERANCE * plain.norm()


def test_small_models_are_left_to_inductor() -> None:
    compiled = torch.compile(tiny_wan(), backend="liteattention", options={**OPTIONS, "inner": "inductor"})
    denoise(compiled, noise(0), [prompt(0)], 2)
    assert kernels_of(compiled) == 0
