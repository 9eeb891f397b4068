"""`explain` decides as the compilation does, hooks and graph breaks included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import TOKENS, Denoiser, inputs
from torch import Tensor

import lite_compile
from lite_compile import Report

OPTIONS: dict[str, Any] = {"inner": "eager", "min_seq_len": 16}


def both(model: torch.nn.Module, *args: Any) -> tuple[Report, Report]:
    """What `explain` says, and what a compilation reports."""
    explained = lite_compile.explain(model, *args, backend_options={"min_seq_len": 16})
    torch._dynamo.reset()
    lite_compile.clear_report()
    with torch.no_grad():
        torch.compile(model, backend="liteattention", options=OPTIONS)(*args)
    return explained, lite_compile.report()


def test_hooks_of_the_model_run() -> None:
    model = Denoiser()
    model.register_forward_pre_hook(lambda _, args: tuple(x[:, :32] if x.dim() == 3 else x for x in args))
    explained, compiled = both(model, *inputs())
    assert explained.sites[0].q_shape[2] == 32
    assert explained == compiled
    assert "forward" not in vars(model)


class Broken(Denoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(hidden_states, timestep, prompt)


def test_the_clock_of_a_model_with_graph_breaks_is_found() -> None:
    explained, compiled = both(Broken(), *inputs())
    assert [site.rewritten for site in explained] == [True]
    assert explained == compiled


def test_a_model_with_a_forward_of_its_own_keeps_it() -> None:
    model = Denoiser()
    original = model.forward

    def forward(*args: Tensor) -> Tensor:
        return original(*(x[:, :48] if x.dim() == 3 else x for x in args))

    model.forward = forward
    report = lite_compile.explain(model, *inputs(), backend_options={"min_seq_len": 16})
    assert report.sites[0].q_shape[2] == 48
    assert model.forward is forward


def test_errors_of_the_model_leave_its_forward_alone() -> None:
    model = Denoiser()
    with pytest.raises(TypeError):
        lite_compile.explain(model, *inputs(), no_such_argument=1)
    assert "forward" not in vars(model)


def test_a_model_that_compiles_itself() -> None:
    model = Denoiser()
    model.compile(backend="liteattention", options=OPTIONS)
    before = lite_compile.report()
    report = lite_compile.explain(model, *inputs(), backend_options={"min_seq_len": 16})
    assert [site.rewritten for site in report] == [True]
    assert lite_compile.report() == before


def test_outputs_whose_size_is_data() -> None:
    class Chosen(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor, int]:
            x = super().forward(hidden_states, timestep, prompt)
            kept = x[:, (prompt[0, :, 0] > 0).nonzero().flatten()]
            return kept, kept.shape[1]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = lite_compile.explain(Chosen(), *inputs(), backend_options={"min_seq_len": TOKENS})
    assert [site.rewritten for site in report] == [True]


def test_nested_inputs() -> None:
    class Extra(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return super().forward(hidden_states, timestep, hidden_states) + prompt.values().sum()

    latents, t, _ = inputs()
    prompt = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    report = lite_compile.explain(Extra(), latents, t, prompt, backend_options={"min_seq_len": 16})
    assert [site.reason for site in report] == [lite_compile.Reason.NO_CLOCK]
