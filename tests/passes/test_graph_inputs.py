from __future__ import annotations

import torch
from graphs import Denoiser, capture, inputs

from lite_compile.passes.graph_inputs import append_input, copy_graph, is_static, placeholders, source_name


def test_copy_leaves_the_original_alone() -> None:
    gm = capture(Denoiser(), *inputs())
    before = gm.code
    copy = copy_graph(gm)
    append_input(copy.graph, "extra", torch.empty(1))
    copy.recompile()
    assert gm.code == before
    assert "extra" in copy.code
    originals, copies = placeholders(gm.graph), placeholders(copy.graph)[:-1]
    assert [source_name(n) for n in originals] == [source_name(n) for n in copies]
    assert [n.meta["example_value"] is o.meta["example_value"] for n, o in zip(copies, originals, strict=True)]


def test_parameters_and_buffers_are_static() -> None:
    class WithBuffer(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(1))
            self.plain = torch.ones(1)

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states, timestep, prompt) * self.table * self.plain + prompt

    nodes = placeholders(capture(WithBuffer(), *inputs()).graph)
    call_inputs = [source_name(n) for n in nodes if not is_static(n)]
    assert sorted(call_inputs) == ["L['hidden_states']", "L['prompt']", "L['timestep']"]
    assert len(nodes) > len(call_inputs) + 6


def test_appended_inputs_are_last_and_static() -> None:
    gm = copy_graph(capture(Denoiser(), *inputs()))
    node = append_input(gm.graph, "state", torch.empty(2, dtype=torch.int32))
    assert placeholders(gm.graph)[-1] is node
    assert is_static(node)
    gm.graph.lint()
