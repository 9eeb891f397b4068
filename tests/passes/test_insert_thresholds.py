from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import Denoiser, capture, inputs
from test_insert_step_guard import lines_with

from lite_compile.clock_source import ClockSource
from lite_compile.passes.graph_inputs import copy_graph, fake_tensor, placeholders
from lite_compile.passes.insert_step_guard import insert_step_guard
from lite_compile.passes.insert_thresholds import insert_thresholds
from lite_compile.threshold_table import COLUMNS


@pytest.mark.parametrize("source", list(ClockSource))
def test_thresholds_are_read_once_right_after_the_clock(source: ClockSource) -> None:
    gm = copy_graph(capture(Denoiser(), *inputs()))
    now = insert_step_guard(gm, source, 4, torch.device("cpu"))
    thresholds = insert_thresholds(gm, now, 3, torch.device("cpu"))
    gm.graph.lint()
    last = placeholders(gm.graph)[-1]
    assert fake_tensor(last).shape == (3, COLUMNS)  # type: ignore[union-attr]
    assert last.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
    assert fake_tensor(thresholds).shape == (3,)  # type: ignore[union-attr]
    assert thresholds.prev is (last if now.op == "placeholder" else now)
    gm.graph.output_node().args = (thresholds,)
    assert_expected_inline(
        lines_with(gm, "thresholds").replace("lite_now", "now").splitlines()[0],
        """thresholds = lite_compile_threshold_table_read_thresholds(lite_table, now)""",
    )
