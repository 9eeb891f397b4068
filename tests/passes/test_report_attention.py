from __future__ import annotations

from expecttest import assert_expected_inline
from graphs import OPTIONS, Denoiser, capture, inputs

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


def test_report_of_dynamic_shapes_shows_symbols() -> None:
    _, _, report = rewrite_graph(capture(Denoiser(), *inputs(), dynamic=True), OPTIONS)
    assert report.sites[0].q_shape[1:2] == (2,)
    assert isinstance(report.sites[0].q_shape[2], str)
