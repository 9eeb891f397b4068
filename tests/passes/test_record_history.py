from __future__ import annotations

from dataclasses import replace

import torch
from expecttest import assert_expected_inline
from graphs import OPTIONS, Denoiser, capture, inputs
from test_insert_step_guard import lines_with

from lite_compile.backend import rewrite_graph
from lite_compile.density_history import history_shape
from lite_compile.passes.graph_inputs import fake_tensor, placeholders

HISTORY = replace(OPTIONS, history=True)


def test_one_history_per_layer_and_one_node_after_the_attention() -> None:
    gm, state, _ = rewrite_graph(capture(Denoiser(cross=True), *inputs()), HISTORY)
    gm.graph.lint()
    assert state is not None
    assert state.history
    assert_expected_inline(
        lines_with(gm, "record_density"),
        """record_density = lite_compile_density_history_record_density([lite_history_0], [lite_state_0], now)""",
    )
    *_, table, layer, history = placeholders(gm.graph)
    assert [node.name for node in (table, layer, history)] == ["lite_table", "lite_state_0", "lite_history_0"]
    value = fake_tensor(history)
    assert value is not None
    assert (tuple(value.shape), value.dtype) == (history_shape(4), torch.int64)


def test_it_survives_the_removal_of_dead_code() -> None:
    gm, _, _ = rewrite_graph(capture(Denoiser(), *inputs()), HISTORY)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert "record_density" in gm.code


def test_without_the_option_the_graph_has_nothing_of_it() -> None:
    gm, state, _ = rewrite_graph(capture(Denoiser(), *inputs()), OPTIONS)
    assert state is not None
    assert not state.history
    assert "history" not in gm.code
