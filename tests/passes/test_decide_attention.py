"""Each reason to leave attention dense, and that the site next to it is rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DIM, HEADS, TOKENS, Denoiser, capture, decide, inputs
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from lite_compile import Options, Reason
from lite_compile.kernels.select_kernel import BREAK_EVEN
from lite_compile.passes.decide_attention import Decline, Rewrite
from lite_compile.passes.graph_inputs import source_name

sdpa = F.scaled_dot_product_attention


def only(decisions: list[Rewrite | Decline]) -> Rewrite | Decline:
    (decision,) = decisions
    return decision


def reason(attend: Any = None, options: Options = graphs.OPTIONS, **kwargs: Any) -> Reason | None:
    decision = only(decide(capture(Denoiser(attend), *inputs(**kwargs)), options))
    return decision.reason if isinstance(decision, Decline) else None


def test_plain_self_attention_is_rewritten() -> None:
    decision = only(decide(capture(Denoiser(), *inputs())))
    assert isinstance(decision, Rewrite)
    assert decision.scale == 1 / math.sqrt(DIM // HEADS)
    assert decision.kernel.name == "cpu"


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0, 2])
def test_any_constant_scale_is_rewritten(scale: float) -> None:
    decision = only(decide(capture(Denoiser(lambda q, k, v: sdpa(q, k, v, scale=scale)), *inputs())))
    assert isinstance(decision, Rewrite)
    assert decision.scale == scale


def test_cross_attention_of_equal_length() -> None:
    decisions = decide(capture(Denoiser(cross=True), *inputs()))
    assert isinstance(decisions[0], Rewrite)
    assert isinstance(decisions[1], Decline)
    assert decisions[1].reason is Reason.CROSS_ATTENTION


def test_cross_attention_of_another_length() -> None:
    latents, t, _ = inputs()
    decisions = decide(capture(Denoiser(cross=True), latents, t, torch.ones(1, 7, DIM)))
    assert [type(d) for d in decisions] == [Rewrite, Decline]
    assert decisions[1].reason is Reason.CROSS_ATTENTION  # type: ignore[union-attr]


def test_values_from_another_input_make_it_cross_attention() -> None:
    class Mixed(graphs.Attention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(x), self.to_v(context))
            )
            return sdpa(q, k, v).transpose(1, 2).flatten(2)

    model = Denoiser(cross=True)
    model.cross = Mixed()
    decisions = decide(capture(model, *inputs()))
    assert decisions[1].reason is Reason.CROSS_ATTENTION  # type: ignore[union-attr]


def test_mask() -> None:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    assert reason(lambda q, k, v: sdpa(q, k, v, mask)) is Reason.MASK


def test_causal() -> None:
    assert reason(lambda q, k, v: sdpa(q, k, v, is_causal=True)) is Reason.CAUSAL


def test_dropout() -> None:
    assert reason(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1)) is Reason.DROPOUT


def test_short_sequence() -> None:
    assert reason(options=Options(min_seq_len=TOKENS + 1)) is Reason.SHORT
    assert reason(options=Options()) is Reason.SHORT, "below the CPU kernel's break-even"
    assert reason(options=Options(min_seq_len=TOKENS)) is None


def test_sequences_too_short_for_the_kernel_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BREAK_EVEN, "cpu", TOKENS)
    assert reason(options=Options()) is None
    monkeypatch.setitem(BREAK_EVEN, "cpu", TOKENS + 1)
    decision = only(decide(capture(Denoiser(), *inputs()), Options()))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.SHORT
    assert f"the cpu kernel pays from {TOKENS + 1} on" in decision.detail


@pytest.mark.parametrize(
    ("dim", "expected"), [(8, Reason.HEAD_DIM), (16, None), (40, None), (256, None), (264, Reason.HEAD_DIM)]
)
def test_head_dim(dim: int, expected: Reason | None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = [torch.cat([x] * 17, -1)[..., :dim] for x in (q, k, v)]
        return sdpa(*wide)[..., :8].repeat(1, 1, 1, 2)

    assert reason(attend) is expected


def test_head_dim_of_values_differs() -> None:
    assert reason(lambda q, k, v: torch.cat([sdpa(q, k, v[..., :8])] * 2, -1)) is Reason.HEAD_DIM


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_that_run(dtype: torch.dtype) -> None:
    assert reason(lambda q, k, v: sdpa(q.to(dtype), k.to(dtype), v.to(dtype)).float()) is None


def test_dtype() -> None:
    assert reason(lambda q, k, v: sdpa(q.double(), k.double(), v.double()).float()) is Reason.DTYPE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_mix_of_dtypes(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return sdpa(q, k, v.to(dtype)).float()

    decision = only(decide(capture(Denoiser(attend), *inputs())))
    assert isinstance(decision, Rewrite)
    operands = (decision.site.q, decision.site.k, decision.site.v)
    assert {operand.meta["example_value"].dtype for operand in operands} == {dtype}


def test_gradients() -> None:
    decision = only(decide(capture(Denoiser(), *inputs(), grad=True)))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.GRAD
    frozen = Denoiser().requires_grad_(False)
    assert isinstance(only(decide(capture(frozen, *inputs(), grad=True))), Rewrite)


def test_grouped_queries() -> None:
    assert reason(lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True)) is None
    assert reason(lambda q, k, v: sdpa(q, k, v, enable_gqa=True)) is None
    assert reason(lambda q, k, v: sdpa(torch.cat([q, q], 1), k, v, enable_gqa=True)[:, :HEADS]) is None


def test_rank() -> None:
    assert reason(lambda q, k, v: sdpa(q[0], k[0], v[0])[None]) is Reason.RANK


def test_scale_that_depends_on_a_dynamic_size() -> None:
    model = Denoiser(lambda q, k, v: sdpa(q, k, v, scale=q.shape[2] ** -0.5))
    decision = only(decide(capture(model, *inputs(), dynamic=True)))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.SCALE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude_layers": ["attn"]}, Reason.EXCLUDED),
        ({"exclude_layers": ["a*"]}, Reason.EXCLUDED),
        ({"layers": ["blocks.*"]}, Reason.EXCLUDED),
        ({"layers": ["attn"], "exclude_layers": ["cross"]}, None),
    ],
)
def test_layer_globs(options: dict[str, Any], expected: Reason | None) -> None:
    assert reason(options=Options(min_seq_len=TOKENS, **options)) is expected


def test_no_identity() -> None:
    class Bare(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return sdpa(hidden_states, hidden_states, hidden_states) * timestep.sin()

    decision = only(decide(capture(Bare(), torch.ones(1, 2, TOKENS, 16), torch.ones(1))))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.NO_IDENTITY


def test_parameters_that_are_no_inputs_are_no_identity() -> None:
    """Dynamo used to keep parameters as attributes of the graph."""
    gm = capture(Denoiser(), *inputs())
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta["example_value"], nn.Parameter):
            node.op = "get_attr"
    decision = only(decide(gm))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.NO_IDENTITY


def test_no_clock_says_what_to_add() -> None:
    decision = only(decide(capture(graphs.Attention(), inputs()[0])))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.NO_CLOCK
    assert "lite_compile.generation(model)" in decision.detail


def test_unsupported_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite_compile.passes.decide_attention.select_kernel", lambda *_, **__: "xpu has no kernel")
    decision = only(decide(capture(Denoiser(), *inputs())))
    assert isinstance(decision, Decline)
    assert (decision.reason, decision.detail) == (Reason.DEVICE, "xpu has no kernel")


def test_normed_weights_are_weights() -> None:
    model = Denoiser()
    for name in ("to_q", "to_k"):
        torch.nn.utils.parametrizations.weight_norm(getattr(model.attn, name))
    assert isinstance(only(decide(capture(model, *inputs()))), Rewrite)


def test_equal_lengths_under_dynamic_shapes() -> None:
    decisions = decide(capture(Denoiser(cross=True), *inputs(), dynamic=True))
    assert [type(d) for d in decisions] == [Rewrite, Decline]


class Trimmed(nn.Module):
    """Attention twice: over all tokens, and over as many as `count` or `kept` say, which is data."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.whole, self.part, self.dim = Denoiser(), graphs.Attention(), dim

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, chosen: Tensor) -> Tensor:
        x = self.whole(hidden_states, timestep, prompt)
        if chosen.dtype == torch.bool:
            extra = prompt[:, chosen.nonzero().flatten()]
            return self.part(torch.cat([x, extra], 1))
        count = chosen.item()
        torch._check(count >= 2)
        torch._check(count <= x.shape[self.dim])
        return self.part(x.narrow(self.dim, 0, count))


@pytest.mark.parametrize(
    ("dim", "chosen"),
    [(1, torch.tensor(40)), (0, torch.tensor(3)), (1, torch.arange(TOKENS) < 20)],
    ids=["length", "batch", "selection"],
)
def test_sizes_that_are_data_keep_one_site_dense(dim: int, chosen: Tensor) -> None:
    data_dependent = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    model = Trimmed(dim)
    with torch._dynamo.config.patch(data_dependent):
        decisions = decide(capture(model, *inputs(batch=4), chosen), Options(min_seq_len=16))
        assert [type(d) for d in decisions] == [Rewrite, Decline]
        assert decisions[1].reason is Reason.SIZE  # type: ignore[union-attr]
        options = {"inner": "eager", "min_seq_len": 16}
        compiled = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
        with torch.no_grad():
            arguments = (*inputs(batch=4), chosen)
            torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_sizes_that_no_guard_may_look_at() -> None:
    arguments = inputs(batch=4)
    for argument in arguments:
        torch._dynamo.decorators.mark_unbacked(argument, 0)
    decision = only(decide(capture(Denoiser(), *arguments)))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.SIZE


@pytest.mark.parametrize("dynamic", [None, True])
def test_empty_batch(dynamic: bool | None) -> None:
    model = Denoiser()
    decision = only(decide(capture(model, *inputs(batch=0), dynamic=dynamic)))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.SIZE
    options = {"inner": "eager", "min_seq_len": 16}
    compiled = torch.compile(model, backend="liteattention", dynamic=dynamic, options=options)
    with torch.no_grad():
        for batch in (1, 0, 2, 0):
            assert compiled(*inputs(batch=batch)).shape == (batch, TOKENS, DIM)


def test_attention_on_tensors_that_wrap_others() -> None:
    q = TwoTensor(torch.ones(1, HEADS, TOKENS, 16), torch.ones(1, HEADS, TOKENS, 16))
    decision = only(decide(capture(lambda q: sdpa(q, q, q), q)))
    assert isinstance(decision, Decline)
    assert (decision.reason, decision.detail) == (Reason.SUBCLASS, "TwoTensor")


def test_norms_and_rotary_embeddings_with_matrices_are_no_projections() -> None:
    norms = nn.LayerNorm((HEADS, DIM // HEADS)), nn.LayerNorm((HEADS, DIM // HEADS))
    cos, sin = (nn.Buffer(torch.rand(TOKENS, DIM // HEADS)) for _ in range(2))

    class Turned(graphs.Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norms, self.cos, self.sin = nn.ModuleList(norms), cos, sin

        def turn(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, -1)
            return torch.addcmul(x * self.cos, torch.cat([-right, left], -1), self.sin)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            context = x if context is None else context
            q, k, v = (
                projected.unflatten(-1, (HEADS, -1))
                for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
            )
            q, k = (self.turn(norm(t).transpose(1, 2)) for norm, t in zip(self.norms, (q, k), strict=True))
            return sdpa(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)

    model = Denoiser(cross=True)
    model.attn = model.cross = Turned()
    decisions = decide(capture(model, *inputs()))
    assert isinstance(decisions[0], Rewrite)
    assert "'to_q'" in source_name(decisions[0].weight)
    assert isinstance(decisions[1], Decline)
    assert decisions[1].reason is Reason.CROSS_ATTENTION


def with_text(attend: Callable[[Any, Tensor, Tensor], Tensor]) -> Denoiser:
    """A denoiser whose tokens are what `attend(attention, tokens, prompt)` makes of the latents."""

    class Joint(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return attend(self.attn, hidden_states + timestep[:, None, None].sin(), prompt)

    return Joint()


def test_text_alone() -> None:
    model = with_text(lambda attention, x, prompt: x + attention(prompt))
    decision = only(decide(capture(model, *inputs())))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.TEXT


def test_text_that_cannot_be_told_from_latents() -> None:
    def attend(attention: Any, x: Tensor, prompt: Tensor) -> Tensor:
        return attention(torch.cat([prompt, x], 1).roll(3, 1))

    gm = capture(with_text(attend), *inputs())
    decision = only(decide(gm))
    assert isinstance(decision, Decline)
    assert decision.reason is Reason.JOINT
    assert "roll" in decision.detail
    decision = only(decide(gm, Options(min_seq_len=TOKENS, protect=[(3, TOKENS + 3)])))
    assert isinstance(decision, Rewrite)
    assert decision.protection.ranges == ((3, TOKENS + 3),)


def test_text_among_latents_is_protected() -> None:
    model = with_text(lambda attention, x, prompt: attention(torch.cat([prompt, x], 1)))
    decision = only(decide(capture(model, *inputs())))
    assert isinstance(decision, Rewrite)
    assert decision.protection.ranges == ((0, TOKENS),)
