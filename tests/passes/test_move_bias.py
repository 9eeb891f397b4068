"""Biases of linear layers go into the ops that read the products, where, and only where, that computes the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_passes import Outcome, noise, run_pass, tiny_ltx, tiny_wan
from rotary_models import EPS, tables, written
from torch import Tensor, fx, nn

from lite_compile.passes.fuse_layer_norm import fuse_layer_norm
from lite_compile.passes.fuse_rotary import fuse_rotary
from lite_compile.passes.move_bias import move_bias

TOKENS, HEADS, DIM = 6, 3, 8
WIDTH = HEADS * DIM
Layer = Callable[[Tensor], Tensor]


def fuse_and_move(gm: fx.GraphModule, device: torch.device, least_elements: int) -> int:
    fuse_layer_norm(gm, device, least_elements)
    fuse_rotary(gm, device, least_elements)
    return move_bias(gm)


run_moved = functools.partial(run_pass, fuse_and_move)


def layer(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> nn.Linear:
    """With a bias that nobody could overlook."""
    made = nn.Linear(WIDTH, width)
    with torch.no_grad():
        made.weight.copy_(noise(1, width, WIDTH))
        made.bias.copy_(10 * noise(2, width))
    return made.to(dtype).requires_grad_(False)


def normed(total: Tensor) -> Tensor:
    return F.layer_norm(total, (WIDTH,), None, None, EPS)


def added(x: Tensor, gate: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """A block's residual and the next norm."""
    total = x + product * gate
    return total, normed(total)


def rotated(product: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return written(F.rms_norm(product, (WIDTH,), weight, EPS).unflatten(2, (HEADS, -1)), cos, sin)


def of_added(spelled: Callable[[nn.Linear, Tensor], Tensor], **kwargs: Any) -> tuple[Outcome, Any]:
    """What becomes of `added` behind a linear layer in a given spelling, and what it should be."""
    torch.manual_seed(0)
    module, x, gate = layer(), noise(3, 2, TOKENS, WIDTH), noise(4, 2, 1, WIDTH)

    def function(x: Tensor, gate: Tensor) -> Any:
        return added(x, gate, spelled(module, x))

    return run_moved(function, x.clone(), gate, **kwargs), function(x.clone(), gate)


def assert_close(result: Any, expected: Any) -> None:
    for found, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


MOVED: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "module": lambda linear, x: linear(x),
    "function": lambda linear, x: F.linear(x, linear.weight, linear.bias),
    "keywords": lambda linear, x: F.linear(bias=linear.bias, weight=linear.weight, input=x),
    "dropout_that_is_off": lambda linear, x: F.dropout(linear(x), 0.5, False),
    "dropout_of_nothing": lambda linear, x: F.dropout(linear(x), 0.0, True),
    "cast_to_its_own_dtype": lambda linear, x: linear(x).type_as(x).to(torch.float32),
    "tokens_as_one_batch": lambda linear, x: linear(x.flatten(0, 1)).view(x.shape),
    "heads_apart": lambda linear, x: linear(x).unflatten(-1, (HEADS, DIM)).flatten(2),
    "projected_norm": lambda linear, x: linear(normed(x)),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", MOVED)
def test_biases_that_the_op_adds(name: str, dynamic: bool | None) -> None:
    outcome, expected = of_added(MOVED[name], dynamic=dynamic)
    assert outcome.fused == 1
    assert outcome.guards == 0
    assert_close(outcome.result, expected)
    assert outcome.code.count("linear(") == 1
    assert "y_bias = " in outcome.code


def used_elsewhere(linear: nn.Linear, x: Tensor) -> Tensor:
    product = linear(x)
    return product + product.mean()


def written_in_place(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(x).mul_(2.0)


def written_in_between(linear: nn.Linear, x: Tensor) -> Tensor:
    """Whoever adds the bias later adds another one."""
    bias = linear.bias * 1.0
    product = F.linear(x, linear.weight, bias)
    bias.add_(1.0)
    return product


LEFT: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "no_bias": lambda linear, x: F.linear(x, linear.weight),
    "one_bias_for_all": lambda linear, x: F.linear(x, linear.weight, linear.bias.mean()),
    "bias_per_token": lambda linear, x: F.linear(x, linear.weight, x),
    "used_elsewhere": used_elsewhere,
    "written_in_place": written_in_place,
    "written_in_between": written_in_between,
    "scaled": lambda linear, x: linear(x) * 2,
    "another_order": lambda linear, x: linear(x).unflatten(-1, (HEADS, DIM)).transpose(2, 3).flatten(2),
    "dropout": lambda linear, x: F.dropout(linear(x), 1.0, True),
    "a_part": lambda linear, x: linear(torch.cat([x, x], 1))[:, : x.shape[1]],
    "other_channels": lambda linear, x: F.linear(
        x.repeat(1, 1, 2).flatten(1).view(2, -1, WIDTH), linear.weight[: WIDTH // 2], linear.bias[: WIDTH // 2]
    ).view(x.shape),
    "rounded": lambda linear, x: linear(x).half().float(),
}


@pytest.mark.parametrize("name", LEFT)
def test_biases_that_stay_where_they_are(name: str) -> None:
    outcome, expected = of_added(LEFT[name])
    assert outcome.fused == 0
    assert "y_bias = " not in outcome.code
    assert_close(outcome.result, expected)


def test_a_product_that_is_also_the_residual_is_left() -> None:
    module, x, gate = layer(), noise(3, 2, TOKENS, WIDTH), noise(4, 2, 1, WIDTH)

    def function(x: Tensor, gate: Tensor) -> Any:
        product = module(x)
        return added(product, gate, product)

    outcome = run_moved(function, x, gate)
    assert "add_normalize" in outcome.code
    assert outcome.fused == 0
    assert_close(outcome.result, function(x, gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_before(dtype: torch.dtype) -> None:
    """The product is rounded before the bias is added instead of after."""
    module, x, gate = layer(dtype), noise(3, 2, TOKENS, WIDTH, dtype=dtype), noise(4, 2, 1, WIDTH, dtype=dtype)

    def function(x: Tensor, gate: Tensor) -> Any:
        total = (x.float() + module(x).float() * gate).type_as(x)
        return total, normed(total)

    outcome = run_moved(function, x, gate)
    assert outcome.fused == 1
    double = [tensor.double() for tensor in (x, gate, module.weight, module.bias)]
    exact = double[0] + F.linear(double[0], *double[2:]) * double[1]
    errors = [float((total.double() - exact).norm()) for total, _ in (outcome.result, function(x, gate))]
    assert errors[0] <= 1.1 * errors[1]
    assert outcome.result[0].dtype is outcome.result[1].dtype is dtype


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_biases_of_queries_and_keys(per_head: bool, dynamic: bool | None) -> None:
    module, x, (cos, sin) = layer(), noise(3, 2, TOKENS, WIDTH), tables(1, TOKENS, 1, DIM)
    weight = noise(5, DIM if per_head else WIDTH)

    def function(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        product = module(x)
        if not per_head:
            return rotated(product, weight, cos, sin)
        return written(F.rms_norm(product.unflatten(2, (HEADS, -1)), (DIM,), weight, EPS), cos, sin)

    for table in (cos, sin):  # the width of a table that is an input would be a symbol under `dynamic=True`
        torch._dynamo.mark_static(table, 3)
    outcome = run_moved(function, x, cos, sin, dynamic=dynamic)
    assert outcome.fused == 1
    assert outcome.guards == 0
    assert "x_bias = " in outcome.code
    torch.testing.assert_close(outcome.result, function(x, cos, sin), rtol=1e-5, atol=1e-5)


def test_queries_out_of_a_joint_projection_are_left() -> None:
    module, x, (cos, sin) = layer(width=2 * WIDTH), noise(3, 2, TOKENS, WIDTH), tables(1, TOKENS, 1, DIM)
    weight = noise(5, WIDTH)

    def function(x: Tensor) -> Tensor:
        return rotated(module(x).chunk(2, -1)[1], weight, cos, sin)

    outcome = run_moved(function, x)
    assert outcome.fused == 0
    torch.testing.assert_close(outcome.result, function(x))


def test_gradients_and_autocast_are_left() -> None:
    module, x, gate = layer(), noise(3, 2, TOKENS, WIDTH), noise(4, 2, 1, WIDTH)

    def cast(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = module(x)
        return added(x, gate, product.float())

    assert run_moved(cast, x).fused == 0
    assert run_moved(lambda x: added(x, gate, module(x)), x.requires_grad_(), grad=True).fused == 0

    def switched(x: Tensor) -> Any:
        with torch.no_grad():
            product = module(x)
        return added(x, gate, product)

    assert run_moved(switched, x.detach(), grad=True).fused == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tiny", "biases"), [(tiny_wan, 10), (tiny_ltx, 5)])
def test_models_of_diffusers(
    tiny: Callable[[], tuple[nn.Module, dict[str, Any]]], biases: int, dtype: torch.dtype
) -> None:
    """Of each block those of q and k; of Wan's also those of both attentions' results and of what is fed forward."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model, given = tiny()
    finally:
        torch.set_default_dtype(torch.float32)
    model.eval()
    given = {
        name: x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x) if isinstance(x, list) else x
        for name, x in given.items()
    } | {"return_dict": False}
    outcome = run_moved(model, **given)
    assert outcome.fused == biases
    with torch.no_grad():
        (expected,) = model(**given)
        exact = {name: x.float() if isinstance(x, Tensor) else x for name, x in given.items()}
        (wanted,) = model.float()(**exact)
    (result,) = outcome.result
    if dtype is torch.float32:
        torch.testing.assert_close(result, expected)
    else:
        assert (result - wanted).norm() < 1.1 * (expected - wanted).norm()
