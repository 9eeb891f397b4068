"""Layer norms become ops that compute what the graph did, with the residual before them and the modulation after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_passes import CPU, noise, tiny_flux, tiny_ltx, tiny_wan
from graphs import capture
from norm_models import (
    BATCH,
    BF16,
    DIM,
    EPS,
    FP16,
    FP32,
    TOKENS,
    Arguments,
    added_modulated,
    arguments,
    blocks,
    gated_affine,
    gated_modulated,
    modulated,
    narrow,
    norm_of,
    run_fused,
)
from torch import Tensor, nn

from lite_compile.passes.fuse_layer_norm import fuse_layer_norm

IN_FLOAT32 = [modulated, gated_affine, added_modulated, gated_modulated]
"""Spellings that round where the op does."""


def assert_fused(function: Callable[..., Any], *args: Any, times: int = 1, grad: bool = False) -> str:
    """Half precision to the bit; the code of the graph."""
    with torch.set_grad_enabled(grad):
        expected = function(*args)
    outcome = run_fused(function, *args, grad=grad)
    assert outcome.fused == times
    assert outcome.guards == 0
    results, wanted = ((x,) if isinstance(x, Tensor) else x for x in (outcome.result, expected))
    for result, tensor in zip(results, wanted, strict=True):
        assert result.stride() == tensor.stride()
        assert result.dtype is tensor.dtype
        if tensor.dtype is FP32:
            torch.testing.assert_close(result, tensor)
        else:
            assert torch.equal(result, tensor)
    return outcome.code


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("spelled", IN_FLOAT32)
@pytest.mark.parametrize("table_batch", [1, BATCH])
def test_spellings_of_wan(spelled: Callable[..., Any], dtype: torch.dtype, table_batch: int) -> None:
    code = assert_fused(spelled, *arguments(dtype, table_batch=table_batch))
    assert "layer_norm(" not in code
    assert ("add_normalize" in code) == (spelled is not modulated)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("modulation", [FP32, None], ids=["float32", "same"])
def test_what_is_all_in_half_precision_is_rounded_less_often(
    dtype: torch.dtype, modulation: torch.dtype | None
) -> None:
    """The op's results are those of float32, rounded once; the norm is that of the rounded sum."""
    args = arguments(dtype, modulation or dtype)
    outcome = run_fused(narrow, *args)
    assert outcome.fused == (1 if modulation is None or dtype is FP32 else 0)  # else the graph's results are float32
    exact = Arguments(*(x.double() for x in args))
    total = exact.x + exact.gate * exact.y
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(outcome.result[0].double(), total, rtol=epsilon, atol=epsilon)
    normed = F.layer_norm(outcome.result[0].double(), (DIM,), None, None, EPS) * (1 + args.scale).double() + exact.shift
    torch.testing.assert_close(
        outcome.result[1].double(), normed, rtol=epsilon, atol=4e-6 if dtype is FP32 else epsilon
    )


def test_sizes_that_are_symbols() -> None:
    for spelled in (*IN_FLOAT32, narrow):
        for table_batch, dims in ((1, (1,)), (BATCH, (0, 1)), (1, (0, 1))):
            args = arguments(table_batch=table_batch)
            for marked in args[:2]:
                for dim in dims:
                    torch._dynamo.mark_dynamic(marked, dim)
            if table_batch > 1:
                args = args._replace(**{name: x.clone() for name, x in args._asdict().items() if x.dim() == 3})
                for marked in (args.x, args.y):
                    torch._dynamo.mark_dynamic(marked, 1)
            assert_fused(spelled, *args)


def test_one_graph_serves_every_length() -> None:
    counts: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        counts.append(fuse_layer_norm(gm, CPU, least_elements=0))
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    run = torch.compile(gated_affine, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in (6, 10, 40):
            args = arguments(BF16, tokens=tokens)
            for marked in args[:2]:
                torch._dynamo.mark_dynamic(marked, 1)
            for found, wanted in zip(run(*args), gated_affine(*args), strict=True):
                assert torch.equal(found, wanted)
    assert counts == [1]


def sum_turned_around(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Any:
    total = torch.add(torch.mul(gate, y.float()), x.float()).to(x.dtype)
    return total, shift.add(torch.mul(1 + scale, norm_of(total))).to(dtype=x.dtype)


def used_in_many_ways(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Any:
    total, normed = gated_modulated(x, y, gate, scale, shift)
    again = total + normed
    again.add_(1.0)
    total.mul_(2.0)
    normed[:, 1:].zero_()
    return again, total.transpose(1, 2).transpose(1, 2), normed, x, y


def only_scaled(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, *_: Tensor) -> Any:
    return (norm_of(x) * scale).type_as(x)


def only_shifted(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Any:
    return (norm_of(x) + shift).type_as(x)


def affine_and_modulated(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> Any:
    return (torch.layer_norm(x.float(), [DIM], weight.float(), bias.float(), eps=EPS) * scale + shift).to(x.dtype)


def only_the_norm_is_used(x: Tensor, y: Tensor, gate: Tensor, *_: Tensor) -> Any:
    return norm_of((x.float() + y * gate).type_as(x)).type_as(x)


def operands_behind_the_sum(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Any:
    total = (x.float() + y * gate).type_as(x)
    scale, shift = (vector.sin().cos() for vector in (scale, shift))
    normed = (norm_of(total) * (1 + scale) + shift).type_as(total)
    return total.exp(), normed


def sum_read_before_the_norm(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Any:
    factor = 1 + scale
    total = (x.float() + y * gate).type_as(x)
    read = total.exp()
    return read, (norm_of(total) * factor + shift).type_as(total)


VARIANTS = [
    sum_turned_around,
    used_in_many_ways,
    only_scaled,
    only_shifted,
    affine_and_modulated,
    only_the_norm_is_used,
    operands_behind_the_sum,
    sum_read_before_the_norm,
]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("spelled", VARIANTS)
def test_variants(spelled: Callable[..., Any], dtype: torch.dtype) -> None:
    given = arguments(dtype)
    expected = spelled(*(x.clone() for x in given))
    outcome = run_fused(spelled, *(x.clone() for x in given))
    assert outcome.fused == 1
    for found, wanted in zip(*((x,) if isinstance(x, Tensor) else x for x in (outcome.result, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0 if dtype is BF16 else None, atol=0 if dtype is BF16 else None)


def test_parameters_that_require_gradients_which_are_switched_off() -> None:
    given = arguments()
    parameters = nn.Parameter(given.weight), nn.Parameter(given.bias)
    assert_fused(gated_affine, *given[:5], *parameters)
    outcome = run_fused(gated_affine, *given[:5], *parameters, grad=True)
    assert outcome.fused == 0
    assert outcome.is_unchanged
    assert_fused(gated_affine, *given, grad=True)


def test_a_weight_without_a_bias_and_the_module() -> None:
    norm = nn.LayerNorm(DIM, EPS, bias=False).requires_grad_(False)
    norm.weight.copy_(noise(9, DIM))
    assert_fused(lambda x, y: (x + y, norm(x + y)), *arguments()[:2])
    assert_fused(lambda x, y: norm(x), *arguments()[:2])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_blocks_in_a_row(dtype: torch.dtype) -> None:
    code = assert_fused(blocks, *arguments(dtype), times=9)
    assert code.count("lite_compile.add_normalize.default(") == 8
    assert code.count("lite_compile.normalize.default(") == 1
    assert code.count(".float()") == 2  # of the last sum, which no norm follows


def test_an_epsilon_that_is_a_symbol() -> None:
    """Under `dynamic=True` that of a module is one, which becomes a constant again: another is compiled anew."""
    norm = nn.LayerNorm(DIM, 0.25, elementwise_affine=False)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        assert fuse_layer_norm(gm, CPU, least_elements=0) == 1
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    x, y, *_ = arguments()
    run = torch.compile(lambda x, y: (x + y, norm(x + y)), backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for eps in (0.25, 4.0, 1e-6):
            norm.eps = eps
            torch.testing.assert_close(run(x, y)[1], F.layer_norm(x + y, (DIM,), None, None, eps))


@pytest.mark.parametrize("least", [BATCH * TOKENS * DIM, BATCH * TOKENS * DIM + 1])
def test_small_ones_stay(least: int) -> None:
    gm = capture(gated_affine, *arguments())
    before = gm.code
    assert fuse_layer_norm(gm, torch.device("cuda", 0), least_elements=0) == 0  # on another device
    fused = fuse_layer_norm(gm, CPU, least_elements=least)
    gm.recompile()
    assert fused == (least == BATCH * TOKENS * DIM)
    assert (gm.code == before) == (fused == 0)
    assert ("add_normalize" in gm.code) == (fused == 1)


def test_a_token_that_does_not_fit_into_registers_stays() -> None:
    assert run_fused(gated_affine, *arguments(dim=(1 << 14) + 1)).is_unchanged
    assert_fused(gated_affine, *arguments(dim=1 << 14))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("make", "times"), [(tiny_wan, 7), (tiny_ltx, 1), (tiny_flux, 11)])
def test_models_of_diffusers(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]], times: int, dtype: torch.dtype, dynamic: bool | None
) -> None:
    """All norms of them, with parameters as `from_pretrained` leaves them."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, given = make()
    model.eval().to(dtype)
    assert all(parameter.requires_grad for parameter in model.parameters())
    given = {
        name: x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x) if isinstance(x, list) else x
        for name, x in given.items()
    }
    with torch.no_grad():
        (expected,) = model(**given, return_dict=False)
    outcome = run_fused(model, **given, return_dict=False, dynamic=dynamic)
    assert outcome.fused == times
    assert "functional.layer_norm(" not in outcome.code
    (result,) = outcome.result
    if dtype is FP32:
        torch.testing.assert_close(result, expected)
    elif make is tiny_wan:  # which computes in float32 what the op does
        assert torch.equal(result, expected)
    else:
        with torch.no_grad():
            exact = {name: x.float() if isinstance(x, Tensor) else x for name, x in given.items()}
            (wanted,) = model.float()(**exact, return_dict=False)
        assert (result - wanted).norm() < 1.1 * (expected - wanted).norm()
