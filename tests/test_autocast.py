"""Models that run under `torch.autocast`: the op computes in the dtype that the dense attention would have had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from graphs import Denoiser, random_inputs
from torch import Tensor, nn

from lite_compile import clear_report, report
from lite_compile.kernels.attend_cpu import CPU_TILE
from lite_compile.skip_state import state_shape

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def normed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Norms and rotary embeddings leave q and k in float32, while v comes from a linear layer."""
    q, k = (x.float() / x.float().norm(dim=-1, keepdim=True) * 4.0 for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def normed_and_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (x.float() / x.float().norm(dim=-1, keepdim=True) * 4.0 for x in (q, k))
    return written(q, k * 0.5, v)


def folded_and_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything is float32 until it is multiplied."""
    folded = (x.float().flatten(0, 1) for x in (q, k, v))
    weights = torch.einsum("nid,njd->nij", next(folded), 0.25 * next(folded)).softmax(-1)
    return torch.bmm(weights, next(folded)).view(q.shape)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(k.shape[2], device=k.device) < 50
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, None])


class Inside(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(hidden_states, timestep, prompt)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    clear_report()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize(
    "attend", [F.scaled_dot_product_attention, normed, written, normed_and_written, folded_and_written, padded]
)
def test_result_is_as_good_as_the_dense_one(attend: Attend, inside: bool, dtype: torch.dtype, inner: str) -> None:
    torch.manual_seed(0)
    exact_model = Denoiser(attend).eval()
    for parameter in exact_model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = Inside(exact_model, dtype) if inside else exact_model
    options = {"inner": inner, "min_seq_len": 1, "threshold": -math.inf}
    sparse_model = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
    arguments = random_inputs(batch=2)
    with torch.no_grad():
        exact = exact_model(*arguments)
        with nullcontext() if inside else torch.autocast("cpu", dtype):
            dense, sparse = model(*arguments), sparse_model(*arguments)
    (site,) = report()
    assert site.rewritten, str(report())
    assert site.dtype == str(dtype).removeprefix("torch.")
    assert sparse.dtype == dense.dtype
    assert sparse.stride() == dense.stride()
    assert 0 < (sparse - exact).norm() <= 1.1 * (dense - exact).norm()


def test_another_autocast_dtype_is_another_graph() -> None:
    """The dtype of the op is part of the graph; torch compiles anew where the ambient dtype changes."""
    torch.manual_seed(0)
    model = Denoiser(normed).eval()
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf}
    sparse_model = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
    arguments = random_inputs()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, None):
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
                torch.testing.assert_close(sparse_model(*arguments), model(*arguments), rtol=1e-2, atol=1e-2)
    assert [site.dtype for site in report()] == ["bfloat16", "float16", "float32"]


def test_the_op_itself_computes_as_without_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    results, threshold = [], torch.tensor(-1.0)
    for enabled in (False, True):
        state = torch.zeros(state_shape(1, 1, 2, 100, 100, CPU_TILE), dtype=torch.int32)
        now = torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, lse = torch.ops.lite_compile.attend(q, k, v, state, now, 0.25, threshold, *CPU_TILE, True, True)
        results.append((out, lse, state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
