from __future__ import annotations

from expecttest import assert_expected_inline
from graphs import OPTIONS, Denoiser, capture, inputs
from joint_models import sd3

from lite_compile import Options
from lite_compile.backend import rewrite_graph


def test_report_prints_as_a_table() -> None:
    _, _, report = rewrite_graph(capture(Denoiser(cross=True), *inputs()), OPTIONS)
    assert_expected_inline(
        str(report),
        """\
graph 0: 1 of 2 attention sites rewritten; clock: latents from 'hidden_states', timestep from 'timestep', 1 conditioning inputs
  layer  decision   q          k          dtype    kernel  reason
  ---------------------------------------------------------------
  attn   rewritten  1x2x64x16  1x2x64x16  float32  cpu
  cross  dense      1x2x64x16  1x2x64x16  float32  dense   cross-attention: k and v are projected from another input""",  # noqa: E501
    )


def test_report_says_what_is_protected() -> None:
    model, arguments, _ = sd3()
    _, _, report = rewrite_graph(capture(model, **arguments), Options(min_seq_len=70))
    assert_expected_inline(
        str(report),
        """\
graph 0: 2 of 3 attention sites rewritten; clock: latents from 'hidden_states', timestep from 'timestep', 2 conditioning inputs
  layer                       decision   q          k          dtype    kernel  protected                                       reason
  ------------------------------------------------------------------------------------------------------------------------------------
  transformer_blocks.0.attn   rewritten  2x2x74x16  2x2x74x16  float32  cpu     64:74 (text: cat in transformer_blocks.0.attn)
  transformer_blocks.0.attn2  dense      2x2x64x16  2x2x64x16  float32  dense                                                   short sequence: 64 tokens, min_seq_len=70
  transformer_blocks.1.attn   rewritten  2x2x74x16  2x2x74x16  float32  cpu     64:74 (text: cat in transformer_blocks.1.attn)""",  # noqa: E501
    )
    assert [(site.protected, site.protected_by) for site in report.sites] == [
        (((64, 74),), "text: cat in transformer_blocks.0.attn"),
        ((), ""),
        (((64, 74),), "text: cat in transformer_blocks.1.attn"),
    ]


def test_report_of_dynamic_shapes_shows_symbols() -> None:
    _, _, report = rewrite_graph(capture(Denoiser(), *inputs(), dynamic=True), OPTIONS)
    assert report.sites[0].q_shape[1:2] == (2,)
    assert isinstance(report.sites[0].q_shape[2], str)


def test_report_of_protected_positions_shows_expressions() -> None:
    model, arguments, _ = sd3()
    _, _, report = rewrite_graph(capture(model, dynamic=True, **arguments), Options(min_seq_len=70))
    start, end = report.sites[0].protected[0]
    assert start == 64
    assert end == report.sites[0].q_shape[2]
    assert f"64:{end} (text: cat in transformer_blocks.0.attn)" in str(report)
