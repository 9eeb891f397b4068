"""A linear layer and GELU become one op where, and only where, that computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lite_compile.passes.fuse_gelu import fuse_gelu

Forward = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """A linear layer from 8 to 6, and `after` what becomes of it."""

    def __init__(self, after: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 6)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, x)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def changed_in_between(layer: Layer, x: Tensor) -> Tensor:
    """Whoever computes the product when the GELU is read sees another x."""
    x = x * 1.0
    y = layer.proj(x)
    x.add_(1.0)
    return tanh_gelu(y) + x.sum()


def in_place(layer: Layer, x: Tensor) -> Tensor:
    y = layer.proj(x)
    y.mul_(2.0)
    return tanh_gelu(y)


def without_bias(layer: Layer, x: Tensor) -> Tensor:
    return tanh_gelu(F.linear(x, layer.proj.weight))


def wide_bias(layer: Layer, x: Tensor) -> Tensor:
    return tanh_gelu(F.linear(x, layer.proj.weight) + layer.proj.bias.float())


FUSED: dict[str, Forward] = {
    "module": lambda layer, x: nn.GELU(approximate="tanh")(layer.proj(x)),
    "keyword": lambda layer, x: tanh_gelu(layer.proj(x)),
    "keywords_of_linear": lambda layer, x: tanh_gelu(F.linear(input=x, bias=layer.proj.bias, weight=layer.proj.weight)),
    "dropout_and_more": lambda layer, x: F.dropout(tanh_gelu(layer.proj(x)), 0.5, False) * 2,
    "used_twice": lambda layer, x: (y := tanh_gelu(layer.proj(x))) + y.mean(),
    "result_written_to": lambda layer, x: tanh_gelu(layer.proj(x)).mul_(2.0),
}
LEFT: dict[str, Forward] = {
    "exact_formula": lambda layer, x: F.gelu(layer.proj(x)),
    "another_function": lambda layer, x: F.silu(layer.proj(x)),
    "product_used_elsewhere": lambda layer, x: (y := layer.proj(x)) + tanh_gelu(y),
    "product_returned": lambda layer, x: tanh_gelu(y := layer.proj(x)) @ y.transpose(-1, -2),
    "changed_in_between": changed_in_between,
    "in_place": in_place,
    "without_bias": without_bias,
    "wide_bias": wide_bias,
    "bias_per_token": lambda layer, x: tanh_gelu(F.linear(x, layer.proj.weight, x[0, :, :6].contiguous())),
    "one_bias_for_all": lambda layer, x: tanh_gelu(F.linear(x, layer.proj.weight, layer.proj.bias.mean())),
    "out": lambda layer, x: tanh_gelu(F.linear(x, layer.proj.weight, layer.proj.bias, out=None)),
    "transposed_input": lambda layer, x: tanh_gelu(layer.proj(x[..., :8, :].transpose(-1, -2))),
}


def fuse_and_run(
    after: Forward, x: Tensor, least_elements: int = 0, dynamic: bool | None = None, grad: bool = False
) -> tuple[int, Tensor, Tensor]:
    """How many were fused, what the graph then computes, and what the model does."""
    model = Layer(after).to(x.dtype).requires_grad_(grad)
    fused: list[int] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        before = gm.code
        fused.append(fuse_gelu(gm, torch.device("cpu"), least_elements))
        gm.graph.lint()
        gm.recompile()
        assert (gm.code == before) == (fused[-1] == 0)
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        result = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(x.clone())
        expected = model(x.clone())
    (count,) = fused
    return count, result, expected


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_computes_the_same(name: str, dtype: torch.dtype, dynamic: bool | None) -> None:
    fused, result, expected = fuse_and_run(FUSED[name], tokens(2, 9, 8, dtype=dtype), dynamic=dynamic)
    assert fused == 1
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", LEFT)
def test_what_would_compute_something_else_is_left(name: str) -> None:
    fused, result, expected = fuse_and_run(LEFT[name], tokens(2, 9, 8))
    assert fused == 0
    assert torch.equal(result, expected)


def test_float32_gradients_and_small_results_are_left() -> None:
    after = FUSED["keyword"]
    assert fuse_and_run(after, tokens(2, 9, 8, dtype=torch.float32))[0] == 0
    assert fuse_and_run(after, tokens(2, 9, 8), grad=True)[0] == 0
    for dynamic in (None, True):  # of a symbol what it is at first decides
        counts = [fuse_and_run(after, tokens(2, 9, 8), 2 * 9 * 6 + more, dynamic)[0] for more in (0, 1)]
        assert counts == [1, 0]


def test_another_device_is_left() -> None:
    def backend(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        assert fuse_gelu(gm, torch.device("cuda", 0), 0) == 0
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Layer(FUSED["keyword"]).bfloat16(), backend=backend)(tokens(2, 9, 8))


def test_gradients_switched_on_in_between_are_left() -> None:
    def after(layer: Layer, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = layer.proj(x)
        return tanh_gelu(y)

    assert fuse_and_run(after, tokens(2, 9, 8), grad=True)[0] == 0


def test_autocast_to_another_dtype_is_left() -> None:
    def after(layer: Layer, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return tanh_gelu(layer.proj(x))

    assert fuse_and_run(after, tokens(2, 9, 8))[0] == 0
