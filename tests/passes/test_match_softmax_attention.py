"""Hand-written attention: what is found, what looks alike, and that the result stays the same."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import (
    DIM,
    HEADS,
    OPTIONS,
    TOKENS,
    Denoiser,
    assert_left_alone,
    capture,
    decide,
    inputs,
    random_inputs,
    run_both,
)
from spellings import HAND_WRITTEN, LOOK_ALIKES, Attend, folded
from test_insert_step_guard import lines_with
from torch import Tensor, nn

from lite_compile import Reason, clear_report, report
from lite_compile.backend import rewrite_graph
from lite_compile.passes.decide_attention import Decline, Rewrite
from lite_compile.passes.graph_inputs import fake_tensor


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_every_spelling_is_rewritten(name: str) -> None:
    gm, state, graph_report = rewrite_graph(capture(Denoiser(HAND_WRITTEN[name]), *inputs(batch=2)), OPTIONS)
    (site,) = graph_report.sites
    assert (site.layer, site.decision) == ("attn", "rewritten")
    assert site.q_shape[-2:] == (TOKENS, DIM // HEADS)
    assert math.prod(map(int, site.q_shape)) == 2 * TOKENS * DIM
    assert state is not None
    text = lines_with(gm, "")
    assert text.count("lite_compile.attend") == 1
    for left in ("softmax", "bmm", "einsum", "matmul", "zeros", "empty"):
        assert left not in text or (left, name) == ("zeros", "zero_mask_viewed")  # zeros are left to Inductor


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_scale(name: str) -> None:
    (decision,) = decide(capture(Denoiser(HAND_WRITTEN[name]), *inputs(batch=2)))
    assert isinstance(decision, Rewrite)
    assert decision.scale == pytest.approx(1.0 if name == "no_scale" else 0.25)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_result_is_that_of_the_dense_attention(name: str) -> None:
    dense, sparse = run_both(Denoiser(HAND_WRITTEN[name]), batch=2)
    torch.testing.assert_close(sparse, dense)
    assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_result_in_16_bits_is_as_good_as_the_dense_one(name: str) -> None:
    model = Denoiser(HAND_WRITTEN[name])
    dense, sparse = run_both(model, dtype=torch.bfloat16, batch=2)
    latents, timestep, prompt = random_inputs(batch=2, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = model.float()(latents.float(), timestep, prompt.float())
    assert sparse.dtype == dense.dtype == torch.bfloat16
    assert (sparse - exact).norm() <= 1.1 * (dense - exact).norm()


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_symbolic_sizes(name: str) -> None:
    decisions = decide(capture(Denoiser(HAND_WRITTEN[name]), *inputs(batch=2), dynamic=True))
    assert [type(decision) for decision in decisions] == [Rewrite]


class ScaleOfTheModule(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.scale, self.dropout = 0.3, 0.0
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.call == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, scale=self.scale)
        if self.call == "q":
            return ((q * self.scale) @ k.mT).softmax(-1) @ v
        return (q @ k.mT * self.scale / 2).softmax(-1) @ v


@pytest.mark.parametrize("call", ["sdpa", "q", "scores"])
def test_a_scale_that_torch_takes_for_variable(call: str) -> None:
    """Under `dynamic=True` numbers of the module are symbols; a change has to be compiled anew."""
    torch._dynamo.reset()
    clear_report()
    model = Denoiser(ScaleOfTheModule(call)).eval()
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf}
    sparse = torch.compile(model, backend="liteattention", fullgraph=True, dynamic=True, options=options)
    arguments = random_inputs()
    with torch.no_grad():
        for scale in (0.3, 0.9, 0.9):
            model.attn.attend.scale = scale
            torch.testing.assert_close(sparse(*arguments), model(*arguments))
    assert [site.rewritten for site in report()] == [True] * (1 if call == "q" else 2)


@pytest.mark.parametrize("name", ["baddbmm", "einsum_heads_third", "unfolded_scores", "timm"])
def test_one_compilation_serves_several_lengths(name: str) -> None:
    torch._dynamo.reset()
    clear_report()
    model = Denoiser(HAND_WRITTEN[name]).eval()
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf}
    sparse = torch.compile(model, backend="liteattention", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        for tokens in (TOKENS, 96, 130):
            arguments = random_inputs(batch=2, tokens=tokens)
            torch.testing.assert_close(sparse(*arguments), model(*arguments))
    assert [site.rewritten for site in report()] == [True]


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_stay_as_they_are(name: str) -> None:
    assert_left_alone(*LOOK_ALIKES[name])


def test_a_declined_neighbour_is_not_touched() -> None:
    """Both kinds in one graph: the declined attention keeps its text."""
    bias = LOOK_ALIKES["bias"][0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return HAND_WRITTEN["timm"](q, k, v) + bias(q, k, v)

    captured = capture(Denoiser(attend), *inputs())
    before = [line for line in lines_with(captured, "").splitlines() if "mean" in line or "softmax_1" in line]
    assert len(before) == 4
    gm, _, found = rewrite_graph(captured, OPTIONS)
    assert [site.decision for site in found.sites] == ["rewritten", "dense"]
    after = lines_with(gm, "")
    for line in before:
        assert line in after


def test_text_of_a_rewritten_graph() -> None:
    gm, _, _ = rewrite_graph(capture(Denoiser(HAND_WRITTEN["baddbmm"]), *inputs()), OPTIONS)
    text = lines_with(gm, "")
    assert_expected_inline(
        text[text.index("reshape = ") : text.index("x_1 = ")].rstrip(),
        """\
reshape = q.reshape(-1, 64, 16)
reshape_1 = k.reshape(-1, 64, 16)
reshape_2 = v.reshape(-1, 64, 16)
unsqueeze = reshape.unsqueeze(0)
unsqueeze_1 = reshape_1.unsqueeze(0)
unsqueeze_2 = reshape_2.unsqueeze(0)
threshold_0 = thresholds[0]
attend_default = torch.ops.lite_compile.attend.default(unsqueeze, unsqueeze_1, unsqueeze_2, lite_state_0, now, 0.25, threshold_0, 128, 64, False)
getitem_2 = attend_default[0]
squeeze = getitem_2.squeeze(0)
reshape_3 = squeeze.reshape((1, 2, 64, 16))
transpose_4 = reshape_3.transpose(1, 2)
flatten = transpose_4.flatten(2)""",  # noqa: E501
    )


def test_the_report_names_the_node_that_is_in_the_way() -> None:
    (decision,) = decide(capture(Denoiser(LOOK_ALIKES["tanh"][0]), *inputs()))
    assert isinstance(decision, Decline)
    assert decision.detail == "tanh changes the scores"


def half(attend: Attend) -> Attend:
    """`attend` in bfloat16 of a float32 model."""
    return lambda q, k, v: attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()


def test_upcasts_leave_the_computation_in_the_input_dtype() -> None:
    (decision,) = decide(capture(Denoiser(half(HAND_WRITTEN["upcast_all"])), *inputs()))
    assert isinstance(decision, Rewrite)
    operands = [fake_tensor(x) for x in (decision.site.q, decision.site.k, decision.site.v, decision.site.node)]
    assert [x is not None and x.dtype for x in operands] == [torch.bfloat16] * 4


def test_a_result_that_stays_in_float32_is_computed_in_float32() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        return (q.float() @ k.float().mT).softmax(-1) @ v.float() * 1.5

    (decision,) = decide(capture(Denoiser(attend), *inputs()))
    assert isinstance(decision, Rewrite)
    operands = [fake_tensor(x) for x in (decision.site.q, decision.site.k, decision.site.v, decision.site.node)]
    assert [x is not None and x.dtype for x in operands] == [torch.float32] * 4


def test_cross_attention() -> None:
    model = Denoiser(cross=True)
    model.cross.attend = HAND_WRITTEN["timm"]  # type: ignore[union-attr]
    decisions = decide(capture(model, *inputs()))
    assert isinstance(decisions[1], Decline)
    assert decisions[1].reason is Reason.CROSS_ATTENTION


def test_gradients() -> None:
    (decision,) = decide(capture(Denoiser(HAND_WRITTEN["timm"]), *inputs(), grad=True))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.GRAD


def test_autocast() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return HAND_WRITTEN["timm"](q, k, v).float()

    (decision,) = decide(capture(Denoiser(attend), *inputs()))
    assert isinstance(decision, Rewrite)
    assert fake_tensor(decision.site.q).dtype is torch.bfloat16


def test_attention_of_attention() -> None:
    """The result of one site is the query of the next."""
    timm = HAND_WRITTEN["timm"]
    dense, sparse = run_both(Denoiser(lambda q, k, v: timm(timm(q, k, v), k, v)), sites=2)
    torch.testing.assert_close(sparse, dense)


def test_shared_upcasts() -> None:
    """Two sites that share a cast of k: it stays until the last of them is rewritten."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        wide = k.float()
        first = ((q.float() @ wide.mT).softmax(-1) @ v.float()).bfloat16()
        second = (q.float() @ wide.mT).softmax(-1) @ v.float()
        return first.float() * 2 + second * 3

    dense, sparse = run_both(Denoiser(attend), sites=2)
    torch.testing.assert_close(sparse, dense, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("rank", [2, 3])
def test_fewer_dimensions(rank: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0, 0] if rank == 2 else x[0] for x in (q, k, v))
        out = (q @ k.mT * 0.25).softmax(-1) @ v
        return out.expand(1, HEADS, TOKENS, DIM // HEADS)

    dense, sparse = run_both(Denoiser(attend))
    torch.testing.assert_close(sparse, dense)


def test_folding_changes_nothing() -> None:
    dense, sparse = run_both(Denoiser(folded(HAND_WRITTEN["operator"])), batch=2)
    torch.testing.assert_close(sparse, dense)
