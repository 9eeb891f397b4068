"""`flex_attention` is rewritten where its sub-graphs show that neither scores nor mask are changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import HEADS, OPTIONS, TOKENS, Denoiser, assert_left_alone, capture, inputs, run_both
from test_insert_step_guard import lines_with
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lite_compile import Reason
from lite_compile.backend import rewrite_graph

FULL = create_block_mask(lambda b, h, i, j: i >= 0, None, None, TOKENS, TOKENS, device="cpu")
CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cpu")
SLOPES = torch.rand(HEADS)


def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = flex_attention(q, k, v, return_lse=True)
    return out + lse[..., None]


REWRITTEN: dict[str, Any] = {
    "plain": lambda q, k, v: flex_attention(q, k, v),
    "scale": lambda q, k, v: flex_attention(q, k, v, scale=0.3),
    "identity": lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score),
    "shared_heads": lambda q, k, v: flex_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "lse_not_used": lambda q, k, v: flex_attention(q, k, v, return_lse=True)[0],
}
DECLINED: dict[str, Any] = {
    "score_mod": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + i - j), Reason.VARIANT,
    ),
    "captured_score_mod": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score * SLOPES[h]), Reason.VARIANT,
    ),
    "soft_cap": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: (score / 5).tanh() * 5),
        Reason.VARIANT,
    ),
    "index": (lambda q, k, v: flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: i * 1.0), Reason.VARIANT),
    "causal": (lambda q, k, v: flex_attention(q, k, v, block_mask=CAUSAL), Reason.MASK),
    "mask_of_everything": (lambda q, k, v: flex_attention(q, k, v, block_mask=FULL), Reason.MASK),
    "lse": (with_lse, Reason.SHARED),
}  # fmt: skip


@pytest.mark.parametrize("name", REWRITTEN)
def test_result_is_that_of_the_dense_attention(name: str) -> None:
    dense, sparse = run_both(Denoiser(REWRITTEN[name]), batch=2)
    torch.testing.assert_close(sparse, dense)
    assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_rewritten(name: str, dynamic: bool) -> None:
    gm, _, report = rewrite_graph(capture(Denoiser(REWRITTEN[name]), *inputs(batch=2), dynamic=dynamic), OPTIONS)
    assert [(site.layer, site.decision) for site in report.sites] == [("attn", "rewritten")]
    assert "flex_attention" not in lines_with(gm, "")
    assert "score_mod" not in lines_with(gm, "")


@pytest.mark.parametrize("name", DECLINED)
def test_what_stays_as_it_is(name: str) -> None:
    assert_left_alone(*DECLINED[name])
