"""Norm and rotary embedding as one kernel on a real GPU: the op beside its specification, and through the backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_passes import noise
from rotary_models import EPS, RotaryDenoiser, Rotate, added, tables, written
from torch import Tensor
from torch._dynamo.utils import counters

import lite_compile
from lite_compile.rotary_op import normalize_rotate, normalize_rotate_cpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}
"""Half a unit in the last place of numbers from 1 to 2; float32 also adds up in another order."""
MODEL_DTYPE = getattr(torch, os.environ.get("LITE_TEST_DTYPE", "float32"))
CALLS = {"threshold": -float("inf"), "min_seq_len": 1}
"""Nothing is skipped."""


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "dim"), [(1, 2), (3, 6), (12, 128), (40, 128), (1, 2048), (24, 96), (128, 128), (1, 1 << 14)]
)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_op_is_its_specification(
    heads: int, dim: int, per_head: bool, per_pair: bool, batch: int, dtype: torch.dtype
) -> None:
    """Rows of a fused projection, tables that are views, with and without a weight."""
    x = noise(0, 2, 37, 3 * heads * dim).to(dtype).chunk(3, -1)[1].unflatten(-1, (heads, dim))
    weight = noise(1, dim if per_head else heads * dim).to(dtype)
    cos, sin = (t[..., 0::2] if per_pair else t for t in tables(batch, 37, 1, dim))
    for given in (weight, None):
        rest = (EPS, per_head, cos.cuda(), sin.cuda())
        out = normalize_rotate(x.cuda(), None if given is None else given.cuda(), *rest)
        expected = normalize_rotate_cpu(x, given, EPS, per_head, cos, sin)
        assert out.is_contiguous()
        # The norm and the result are each rounded, and the norm may be to the other side.
        y = normalize_rotate_cpu(x, given, EPS, per_head, torch.ones_like(cos), torch.ones_like(sin)).float().abs()
        bound = 4 * ULP[dtype] * (y.amax() + expected.float().abs())
        assert ((out.cpu().float() - expected.float()).abs() <= bound).all()


def model_and_inputs(rotate: Rotate, tokens: int, batch: int = 1) -> tuple[RotaryDenoiser, Callable[[int], Any]]:
    torch.manual_seed(0)
    model = RotaryDenoiser(heads=4, dim=64, rotate=rotate).cuda().to(MODEL_DTYPE).eval()

    def inputs(step: int, tokens: int = tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = (noise(0, batch, tokens, 256) * (1 - 0.1 * step)).to("cuda", MODEL_DTYPE)
        time = torch.full((batch,), 900.0 - 100 * step, device="cuda")
        found = [x, time, *(table.cuda() for table in tables(1, tokens, 1, 64))]
        for table in found[2:]:  # the width of a table that is an input would be a symbol under `dynamic=True`
            torch._dynamo.mark_static(table, 3)
        return tuple(found)

    return model, inputs


@pytest.mark.parametrize("rotate", [written, added])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("inner", "mode"),
    [("inductor", "default"), ("inductor", "reduce-overhead"), ("aot_eager", "default"), ("eager", "default")],
)
def test_a_block_computes_what_the_model_does(
    rotate: Rotate, dynamic: bool, inner: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of one compilation, which launch the kernel."""
    monkeypatch.setattr("lite_compile.passes.fuse_rotary.LEAST_ELEMENTS", 0)
    model, inputs = model_and_inputs(rotate, 300)
    options = {**CALLS, "inner": inner, **({"mode": mode} if inner == "inductor" else {})}
    run = torch.compile(model, backend="liteattention", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for step in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            args = inputs(step)
            result, expected = run(*args).clone(), model(*args)
            assert (result - expected).norm() <= 2e-2 * expected.norm()
            difference = (result - args[0]).double() - (expected - args[0]).double()
            assert difference.norm() <= 5e-2 * (expected - args[0]).double().norm()
        assert counters["stats"]["unique_graphs"] == 1
        assert [site.rewritten for site in lite_compile.report().graphs[-1].sites] == [True]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run(*inputs(3))
            torch.cuda.synchronize()
    launches = sum(event.count for event in trace.key_averages() if "normalize_rotate" in event.key)
    assert launches == 2


def test_one_graph_serves_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite_compile.passes.fuse_rotary.LEAST_ELEMENTS", 0)
    model, inputs = model_and_inputs(written, 300)
    run = torch.compile(model, backend="liteattention", fullgraph=True, dynamic=True, options=CALLS)
    with torch.no_grad():
        for tokens in (300, 512, 1111):
            args = inputs(0, tokens)
            expected = model(*args)
            assert (run(*args) - expected).norm() <= 2e-2 * expected.norm()
    assert counters["stats"]["unique_graphs"] == 1


def test_tables_made_in_the_graph_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor would be free to lay out what it computes; the kernel was told strides."""
    monkeypatch.setattr("lite_compile.passes.fuse_rotary.LEAST_ELEMENTS", 0)

    def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return written(y, (cos * 2).float() / 2, torch.cat([sin, sin], 1)[:, : y.shape[1]] + 0.0)

    model, inputs = model_and_inputs(rotate, 300, batch=2)
    run = torch.compile(model, backend="liteattention", fullgraph=True, options=CALLS)
    with torch.no_grad():
        args = inputs(0)
        expected = model(*args)
        difference = (run(*args) - expected).double()
        assert difference.norm() <= 5e-2 * (expected - args[0]).double().norm()


@pytest.mark.parametrize("asked", [True, False])
def test_the_option_and_the_size_decide(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for least in (0, 1 << 40):
        torch._dynamo.reset()
        monkeypatch.setattr("lite_compile.passes.fuse_rotary.LEAST_ELEMENTS", least)
        model, inputs = model_and_inputs(written, 300)
        run = torch.compile(model, backend="liteattention", options={**CALLS, "fuse_rotary": asked})
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run(*inputs(0))
            torch.cuda.synchronize()
        assert any("normalize_rotate" in event.key for event in trace.key_averages()) == (asked and least == 0)
