from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import OPTIONS, Denoiser, capture, inputs
from models import noise, prompt, tiny_wan
from test_insert_step_guard import lines_with

from lite_compile import Options
from lite_compile.backend import rewrite_graph
from lite_compile.passes.graph_inputs import fake_tensor, placeholders


def rewrite(model: Any, *args: Any, options: Options = OPTIONS, **kwargs: Any) -> tuple[torch.fx.GraphModule, Any, Any]:
    return rewrite_graph(capture(model, *args, **kwargs), options)


def test_text_of_a_rewritten_graph() -> None:
    gm, state, _ = rewrite(Denoiser(cross=True), *inputs())
    assert_expected_inline(
        lines_with(gm, "lite_"),
        """\
now = lite_compile_clock_advance(lite_clock, l_hidden_states_, l_timestep_, [l_prompt_], 4)
thresholds = lite_compile_threshold_table_read_thresholds(lite_table, now)
attend_default = torch.ops.lite_compile.attend.default(q, k, v, lite_state_0, now, 0.25, threshold_0, 128, 64, True)""",
    )
    assert len(lines_with(gm, "nn.scaled_dot_product_attention(").splitlines()) == 1  # the cross-attention is left
    assert [layer.layer for layer in state.layers] == ["attn"]
    gm.graph.lint()


def test_criterion_of_a_rewritten_graph() -> None:
    gm, _, _ = rewrite(Denoiser(), *inputs(), options=replace(OPTIONS, criterion="mass"))
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lite_compile.attend.default)
    assert node.kwargs == {"criterion": "mass"}


def test_every_attn1_of_wan_is_rewritten_and_every_attn2_declined() -> None:
    arguments = {"hidden_states": noise(0), "timestep": torch.tensor([999]), "encoder_hidden_states": prompt(0)}
    gm, _, report = rewrite(tiny_wan(layers=3), options=Options(min_seq_len=64), **arguments)
    assert_expected_inline(
        "\n".join(f"{site.layer} {site.decision} {site.reason and site.reason.value}" for site in report.sites),
        """\
blocks.0.attn1 rewritten None
blocks.0.attn2 dense cross-attention
blocks.1.attn1 rewritten None
blocks.1.attn2 dense cross-attention
blocks.2.attn1 rewritten None
blocks.2.attn2 dense cross-attention""",
    )
    assert len(lines_with(gm, "torch.ops.lite_compile.attend").splitlines()) == 3
    assert len(lines_with(gm, "nn.scaled_dot_product_attention(").splitlines()) == 3
    assert len(lines_with(gm, "advance").splitlines()) == 1


def test_a_graph_without_rewrites_is_returned_as_it_is() -> None:
    captured = capture(Denoiser(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), *inputs())
    text = captured.code
    gm, state, _ = rewrite_graph(captured, OPTIONS)
    assert gm is captured
    assert state is None
    assert gm.code == text


def test_output_layout_is_that_of_the_dense_attention() -> None:
    """Code after the attention may view its output, which depends on the layout."""
    for contiguous in (False, True):

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, contiguous: bool = contiguous) -> torch.Tensor:
            q = q.contiguous() if contiguous else q
            return F.scaled_dot_product_attention(q, k, v)

        gm, _, _ = rewrite(Denoiser(attend), *inputs(batch=2))
        (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.lite_compile.attend.default)
        out = node.meta["example_value"][0]
        (result,) = node.users
        assert out.stride() == fake_tensor(result).stride()  # type: ignore[union-attr]
        assert out.is_contiguous() == contiguous


def test_symbolic_state_sizes() -> None:
    gm, state, _ = rewrite(Denoiser(), *inputs(), dynamic=True)
    (layer,) = state.layers
    assert isinstance(layer.q_len, torch.SymInt)
    shape = fake_tensor(placeholders(gm.graph)[-1]).shape  # type: ignore[union-attr]
    assert isinstance(shape[3], torch.SymInt)
    assert isinstance(shape[4], torch.SymInt)
