"""A linear layer with GELU in its epilogue, on a GPU and through Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

from lite_compile.passes.fuse_gelu import fuse_gelu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1000, 1536, 8960), (1, 77, 40, 24), (3, 1, 8, 16), (1, 5, 7, 13)])
def test_as_exact_as_two_kernels(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """By the tanh formula, whatever the library chooses for the size; odd sizes included."""
    batch, tokens, width, inner = shape
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh")).cuda().to(dtype).requires_grad_(False)
    x = torch.randn(batch, tokens, width, device="cuda", dtype=dtype) * 2
    fused: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> object:
        fused.append(fuse_gelu(gm, x.device, 0))
        gm.recompile()
        return compile_fx(gm, example_inputs)

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend, fullgraph=True)(x)
    linear = model[0]
    exact = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()), approximate="tanh")
    assert fused == [1]
    assert result.shape == exact.shape
    assert error(result, exact) <= error(model(x), exact) * 1.05
