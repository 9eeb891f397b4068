"""Details that are easily forgotten: gradient modes, freed models, torch._dynamo.reset()."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from models import DEVICE, DTYPE, OPTIONS, compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile.layer_state import bindings, layer_states


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def arguments(seed: int = 0, t: float = 1000.0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed),
        "timestep": torch.tensor([t], device=DEVICE),
        "encoder_hidden_states": prompt(seed),
        "return_dict": False,
    }


def test_inference_mode_and_no_grad_share_the_state() -> None:
    model = tiny_wan()
    run = compiled(model)
    for step, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
        with mode():
            call = arguments()
            run(
                **{
                    **call,
                    "hidden_states": call["hidden_states"] * (1 - 0.1 * step),
                    "timestep": call["timestep"] - step,
                }
            )
    (stream, *_) = lite_compile.stats(model).streams
    assert stream.generations == 1
    assert not any(state.state.is_inference() for state in layer_states(model))


def test_with_gradients_the_model_stays_dense_and_backward_works() -> None:
    model, reference = tiny_wan(layers=1), tiny_wan(layers=1)
    run = compiled(model)
    run(**arguments())[0].square().mean().backward()
    reference(**arguments())[0].square().mean().backward()
    assert {site.reason for site in lite_compile.report().graphs[-1].sites if site.layer.endswith("attn1")} == {
        lite_compile.Reason.GRAD
    }
    weight, expected = (m.blocks[0].attn1.to_q.weight.grad for m in (model, reference))
    assert weight is not None
    torch.testing.assert_close(weight, expected)
    with torch.no_grad():
        run(**arguments())
    assert lite_compile.report().graphs[-1].sites[0].rewritten


def test_deleting_the_model_frees_its_state() -> None:
    gc.collect()
    before = len(layer_states()), len(bindings())
    model = tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 4, stop_after=2)
    state = layer_states(model)[0].state
    freed = weakref.ref(state)
    assert len(layer_states()) == before[0] + 2
    del model, run, state
    torch._dynamo.reset()
    gc.collect()
    assert freed() is None
    assert (len(layer_states()), len(bindings())) == before


def test_state_survives_a_dynamo_reset() -> None:
    """Compiling the same graph again does not lose the generation."""
    model = tiny_wan()
    expected = denoise(compiled(tiny_wan()), noise(0), [prompt(0)], 6)
    run = compiled(model)
    calls = 0

    def resetting(**kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            torch._dynamo.reset()
        return run(**kwargs)

    assert torch.equal(denoise(resetting, noise(0), [prompt(0)], 6), expected)
    assert {s.steps for s in lite_compile.stats(model).streams} == {6}


def test_compilations_with_other_options_share_nothing() -> None:
    """A mask of a bold threshold is never used under a careful one."""
    model = tiny_wan()
    careful = compiled(model, threshold=-float("inf"))
    bold = compiled(model, threshold=-1.0)
    denoise(bold, noise(0), [prompt(0)], 6)
    alone = denoise(compiled(tiny_wan(), threshold=-float("inf")), noise(0), [prompt(0)], 6)
    assert torch.equal(denoise(careful, noise(0), [prompt(0)], 6), alone)
    assert {s.density for s in lite_compile.stats(model).streams} == {1.0}  # of the compilation that ran last
    denoise(bold, noise(0), [prompt(0)], 6)
    assert max(s.density for s in lite_compile.stats(model).streams) < 1


def test_copies_do_not_share_a_mask() -> None:
    import copy

    model = tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 4, stop_after=2)
    clone = copy.deepcopy(model)
    expected = denoise(compiled(tiny_wan()), noise(0), [prompt(1)], 4)
    assert torch.equal(denoise(compiled(clone), noise(0), [prompt(1)], 4), expected)


def test_parameters_written_in_place_make_another_model() -> None:
    """A LoRA that is fused after one call: the restart has the same inputs, but not the same attention."""

    def fuse(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.blocks[0].attn1.to_q.weight.mul_(1.5)

    model, fresh = tiny_wan(), tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 6, stop_after=1)
    fuse(model)
    fuse(fresh)
    assert torch.equal(denoise(run, noise(0), [prompt(0)], 6), denoise(compiled(fresh), noise(0), [prompt(0)], 6))


class Prompted(torch.nn.Module):
    """A model whose prompt is not an argument."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.inner = tiny_wan()
        if as_buffer:
            self.register_buffer("context", prompt(0))
        else:
            self.context = prompt(0)

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: Any, return_dict: Any
    ) -> Any:
        return self.inner(hidden_states, timestep, self.context, return_dict=False)


@pytest.mark.parametrize("kind", ["attribute", "buffer replaced", "buffer written in place"])
def test_prompts_that_are_no_arguments(kind: str) -> None:
    def tell(model: Prompted, number: int) -> Prompted:
        if kind == "buffer written in place":
            model.context.copy_(prompt(number))
        else:
            model.context = prompt(number)
        return model

    model = Prompted(as_buffer=kind != "attribute")
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 6, stop_after=1)
    tell(model, 5)
    result = denoise(run, noise(0), [prompt(0)], 6)
    fresh = tell(Prompted(as_buffer=kind != "attribute"), 5)
    assert torch.equal(result, denoise(compiled(fresh), noise(0), [prompt(0)], 6))
    assert lite_compile.stats(model).density < 1


def test_a_buffer_that_is_replaced_takes_the_states_made_with_it_along() -> None:
    model = Prompted(as_buffer=True)
    run = compiled(model)
    with torch.no_grad():
        for number in range(4):
            model.context = prompt(number)
            run(**arguments())
    assert len(bindings(model)) == 1


def test_models_that_share_their_first_block() -> None:
    first, second = tiny_wan(0), tiny_wan(1)
    second.blocks[0] = first.blocks[0]
    runs = [compiled(model) for model in (first, second)]
    denoise(runs[0], noise(0), [prompt(0)], 6, stop_after=1)
    result = denoise(runs[1], noise(0), [prompt(0)], 6)
    other = tiny_wan(1)
    other.blocks[0] = tiny_wan(0).blocks[0]
    assert torch.equal(result, denoise(compiled(other), noise(0), [prompt(0)], 6))


def test_graph_breaks_of_a_model_compiled_in_place_leave_the_rest_dense() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_wan()

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            hidden_states = hidden_states * 1.0
            torch._dynamo.graph_break()
            result: torch.Tensor = self.inner(hidden_states, timestep, prompt, return_dict=False)[0]
            return result

    model = Broken()
    model.compile(backend="liteattention", options=OPTIONS)
    with torch.no_grad():
        model(noise(0), torch.tensor([1000.0], device=DEVICE), prompt(0))
    sites = lite_compile.report().graphs[-1].sites
    assert {site.reason for site in sites if site.layer.endswith("attn1")} == {lite_compile.Reason.NO_CLOCK}
    assert "graph break" in str(lite_compile.report())
    assert "use torch.compile(model)" in str(lite_compile.report())


def test_moving_the_model_keeps_its_identity() -> None:
    """Offloading replaces the data of a parameter, not the parameter."""
    model = tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 4, stop_after=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        run(**arguments())
    assert len(bindings(model)) == 1


def test_explain_runs_nothing_and_leaves_no_trace() -> None:
    model = tiny_wan()
    before = lite_compile.report()
    result = lite_compile.explain(model, **arguments(), backend_options={"min_seq_len": 64})
    assert [site.decision for site in result.sites] == ["rewritten", "dense"] * 2
    assert lite_compile.report() == before
    assert layer_states(model) == []
    short = lite_compile.explain(compiled(model), **arguments())
    assert {site.reason for site in short.sites if site.layer.endswith("attn2")} == {
        lite_compile.Reason.CROSS_ATTENTION
    }


def test_explain_does_not_use_up_recompilations() -> None:
    model = tiny_wan(layers=1)
    for height in (32, 48, 64, 32, 48, 64, 32, 48, 64, 32):
        call = {**arguments(), "hidden_states": noise(0, (1, 4, 4, height, 32))}
        lite_compile.explain(model, **call, backend_options={"min_seq_len": 64})
    with torch.no_grad():
        compiled(model)(**arguments())
    assert lite_compile.report().graphs[-1].sites[0].q_shape == (1, 2, 1024, 32)
    assert lite_compile.report().graphs[-1].sites[0].rewritten


def test_explain_of_something_else() -> None:
    with pytest.raises(TypeError, match="3"):
        lite_compile.explain(3)  # type: ignore[arg-type]


def test_explain_checks_its_options() -> None:
    with pytest.raises(ValueError, match="threshold"):
        lite_compile.explain(tiny_wan(), **arguments(), backend_options={"treshold": -1})


def test_an_error_of_ours_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("broken")

    monkeypatch.setattr("lite_compile.backend.find_attention", broken)
    model = tiny_wan(layers=1)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="KeyError"):
            result = compiled(model)(**arguments())[0]
        assert torch.equal(result, model(**arguments())[0])
        assert "KeyError" in str(lite_compile.report())
        torch._dynamo.reset()
        with pytest.raises(Exception, match="broken"):
            compiled(model, on_unsupported="error")(**arguments())


def test_on_unsupported_error_names_the_layer_and_a_way_out() -> None:

    class Causal(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = tiny_wan(layers=1).blocks[0].attn1

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
            return self.attn(tokens, None, mask)

    run = torch.compile(Causal(), backend="liteattention", options={**OPTIONS, "on_unsupported": "error"})
    with torch.no_grad(), pytest.raises(lite_compile.UnsupportedAttentionError, match=r"'attn'.*attention mask"):
        run(torch.randn(1, 128, 64, device=DEVICE, dtype=DTYPE))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_has_no_say(whole: bool, dtype: torch.dtype) -> None:
    """Many scripts leave it at 16 bits, whose timesteps would be too coarse to tell steps apart."""

    def generate() -> torch.Tensor:
        torch._dynamo.reset()
        model = tiny_wan()
        if whole:
            run = compiled(model, history=True)
        else:
            model.compile_repeated_blocks(backend="liteattention", fullgraph=True, options={**OPTIONS, "history": True})
            run = model
        latents, text = noise(0), prompt(0)
        times = [torch.tensor([999.0 - step], device=DEVICE) for step in range(5)]
        before = torch.get_default_dtype()
        torch.set_default_dtype(chosen)
        try:
            with torch.no_grad():
                for time in times:
                    latents = latents - 0.1 * run(latents, time, text, return_dict=False)[0]
        finally:
            torch.set_default_dtype(before)
        assert {stream.steps for stream in lite_compile.stats(model).streams} == {5}
        assert lite_compile.stats(model).density < 1
        return latents

    chosen = torch.float32
    expected = generate()
    chosen = dtype
    assert torch.equal(generate(), expected)
