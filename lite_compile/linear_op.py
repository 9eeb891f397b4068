"""The op `lite_compile::linear_gelu`: a linear layer and GELU, on GPUs in the matrix product's own epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("lite_compile", "FRAGMENT")
_library.define("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor")


@torch.library.register_fake("lite_compile::linear_gelu", lib=_library)
def _linear_gelu_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.impl(_library, "linear_gelu", "CPU")
def _linear_gelu_cpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What it computes: `gelu(x @ weight^T + bias)` by the tanh formula; x `[..., K]`, weight `[N, K]`, bias `[N]`."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh").contiguous()


@torch.library.impl(_library, "linear_gelu", "CUDA")
def _linear_gelu_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # In a graph, Inductor would take this function apart again: that is why there is an op around it.
    out = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])
