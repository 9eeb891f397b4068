"""`torch.nn.MultiheadAttention` becomes projections around the op, or stays one call."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import DIM, HEADS, OPTIONS, TOKENS, Denoiser, capture, inputs, run_both
from test_insert_step_guard import lines_with
from torch import Tensor, nn

from lite_compile import Reason
from lite_compile.backend import rewrite_graph
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.trace_projections import trace_projections


class Mha(nn.Module):
    """`nn.MultiheadAttention` in the place of a `Denoiser`'s attention.

    Args:
        call: arguments of the call.
        options: arguments of the constructor.
    """

    def __init__(self, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options})
        self.call = {"need_weights": False, **(call or {})}

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        if not self.mha.batch_first:
            x, context = x.transpose(0, 1), context.transpose(0, 1)
        out, weights = self.mha(x, context, context, **self.call)
        out = out if self.mha.batch_first else out.transpose(0, 1)
        return out if weights is None else self.use(out, weights)

    def use(self, out: Tensor, weights: Tensor) -> Tensor:
        return out


class WithPositions(Mha):
    """Positions are added to q and k, not to v."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        positioned = x * 1.5
        out: Tensor = self.mha(positioned, positioned, x, need_weights=False)[0]
        return out


class UsesWeights(Mha):
    def use(self, out: Tensor, weights: Tensor) -> Tensor:
        return out + weights.mean()


class Padded(Mha):
    """The last tokens of each batch entry are padding; `kind` is the dtype of the mask."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        last = torch.arange(x.shape[1], 0, -1, device=x.device)
        padding = last <= 5 * torch.arange(1, x.shape[0] + 1, device=x.device)[:, None]
        self.call = {"need_weights": False, "key_padding_mask": padding if self.kind == torch.bool else -9.0 * padding}
        return super().forward(x, context)


def denoiser(attention: nn.Module, cross: bool = False) -> Denoiser:
    model = Denoiser(cross=cross)
    if cross:
        model.cross = attention  # type: ignore[assignment]
    else:
        model.attn = attention  # type: ignore[assignment]
    return model.eval()


REWRITTEN = {
    "batch_first": lambda: Mha(),
    "length_first": lambda: Mha(batch_first=False),
    "no_bias": lambda: Mha(bias=False),
    "weights_not_used": lambda: Mha({"need_weights": True}),
    "dropout_in_eval": lambda: Mha(dropout=0.1),
    "padding": lambda: Padded(torch.bool),
    "padding_added": lambda: Padded(torch.float32),
    "separate_projections": lambda: Mha(kdim=DIM, vdim=DIM),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", REWRITTEN)
def test_result_is_that_of_the_dense_attention(name: str, batch: int) -> None:
    dense, sparse = run_both(denoiser(REWRITTEN[name]()), batch=batch)
    torch.testing.assert_close(sparse, dense)
    assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("name", REWRITTEN)
def test_symbolic_sizes(name: str) -> None:
    gm, state, report = rewrite_graph(capture(denoiser(REWRITTEN[name]()), *inputs(batch=2), dynamic=True), OPTIONS)
    (site,) = report.sites
    assert (site.layer, site.decision) == ("attn.mha", "rewritten")
    assert site.q_shape[1] == HEADS
    assert state is not None
    assert "multi_head_attention_forward" not in lines_with(gm, "")


def test_text_of_a_rewritten_graph() -> None:
    gm, _, _ = rewrite_graph(capture(denoiser(Mha()), *inputs()), OPTIONS)
    text = re.sub(r"l_self_modules\w*_parameters_", "", lines_with(gm, ""))
    assert_expected_inline(
        text[text.index("query = ") : text.index("x_1 = ")].rstrip(),
        """\
query = x.transpose(1, 0)
linear = torch._C._nn.linear(query, in_proj_weight_, in_proj_bias_)
chunk = linear.chunk(3, -1)
getitem_2 = chunk[0]
unflatten = getitem_2.unflatten(-1, (2, 16))
permute = unflatten.permute(1, 2, 0, 3)
getitem_3 = chunk[1]
unflatten_1 = getitem_3.unflatten(-1, (2, 16))
permute_1 = unflatten_1.permute(1, 2, 0, 3)
getitem_4 = chunk[2]
unflatten_2 = getitem_4.unflatten(-1, (2, 16))
permute_2 = unflatten_2.permute(1, 2, 0, 3)
threshold_0 = thresholds[0]
attend_default = torch.ops.lite_compile.attend.default(permute, permute_1, permute_2, lite_state_0, now, 0.25, threshold_0, 128, 64, True)
getitem_5 = attend_default[0]
permute_3 = getitem_5.permute(2, 0, 1, 3)
flatten = permute_3.flatten(2)
linear_1 = torch._C._nn.linear(flatten, weight_, bias_)
attn_output_1 = linear_1.transpose(1, 0)
attn_output_2 = attn_output_1.contiguous()""",  # noqa: E501
    )


def test_identity_is_the_packed_weight() -> None:
    (site,) = find_attention(capture(denoiser(Mha()), *inputs()))
    for operand in (site.q, site.k, site.v):
        (projection,) = trace_projections(operand)
        assert "in_proj_weight" in projection.weight.name


DECLINED = {
    "weights": (lambda: UsesWeights({"need_weights": True}), Reason.SHARED),
    "weights_per_head": (lambda: UsesWeights({"need_weights": True, "average_attn_weights": False}), Reason.SHARED),
    "mask": (lambda: Mha({"attn_mask": torch.zeros(TOKENS, TOKENS)}), Reason.MASK),
    "mask_and_padding": (
        lambda: Mha({"attn_mask": torch.zeros(TOKENS, TOKENS), "key_padding_mask": torch.zeros(1, TOKENS)}),
        Reason.MASK,
    ),
    "causal": (
        lambda: Mha({"attn_mask": torch.ones(TOKENS, TOKENS).triu(1).bool(), "is_causal": True}), Reason.MASK,
    ),
    "dropout": (lambda: Mha(dropout=0.1).train(), Reason.DROPOUT),
    "bias_kv": (lambda: Mha(add_bias_kv=True), Reason.VARIANT),
    "positions": (lambda: WithPositions(), Reason.CROSS_ATTENTION),
    "zero_attn": (lambda: Mha(add_zero_attn=True), Reason.VARIANT),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_stays_one_call(name: str) -> None:
    build, reason = DECLINED[name]
    model = denoiser(build())
    if name == "dropout":
        model.train()
    gm = capture(model, *inputs())
    before = gm.code
    rewritten, _, report = rewrite_graph(gm, OPTIONS)
    assert [site.reason for site in report.sites] == [reason]
    assert rewritten is gm
    assert gm.code == before


def test_cross_attention() -> None:
    _, _, report = rewrite_graph(capture(denoiser(Mha(), cross=True), *inputs()), OPTIONS)
    assert [site.reason for site in report.sites] == [None, Reason.CROSS_ATTENTION]


def test_input_without_batch() -> None:
    class Unbatched(Mha):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            out: Tensor = self.mha(x[0], x[0], x[0], need_weights=False)[0]
            return out[None]

    _, _, report = rewrite_graph(capture(denoiser(Unbatched()), *inputs()), OPTIONS)
    assert [site.reason for site in report.sites] == [Reason.RANK]


def test_autocast_around_the_layer() -> None:
    """The planned projections see no autocast, so their dtype is not the graph's."""

    class Autocast(Mha):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    _, _, report = rewrite_graph(capture(denoiser(Autocast()), *inputs()), OPTIONS)
    assert [site.reason for site in report.sites] == [Reason.DTYPE]


def test_whole_encoder_layer() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    _, _, report = rewrite_graph(capture(denoiser(Encoder()), *inputs()), OPTIONS)
    assert [site.reason for site in report.sites] == [Reason.VARIANT]
