"""Details that are easily forgotten: gradient modes, freed models, torch._dynamo.reset(), threads."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from models import DEVICE, DTYPE, OPTIONS, TOLERANCE, compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile.control import model_parameters
from lite_compile.layer_state import clocks, layer_states


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
    with torch.inference_mode():
        run(**arguments())
    with torch.no_grad():
        run(**arguments())
    with torch.inference_mode():
        run(**arguments())
    (stream, *_) = lite_compile.stats(model).streams
    assert stream.generations == 1
    assert not any(state.state.is_inference() for state in layer_states(model_parameters(model)))


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
    before = len(list(layer_states())), len(clocks())
    model = tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 4, stop_after=2)
    state = next(layer_states(model_parameters(model))).state
    freed = weakref.ref(state)
    assert len(list(layer_states())) == before[0] + 2
    del model, run, state
    torch._dynamo.reset()
    gc.collect()
    assert freed() is None
    assert (len(list(layer_states())), len(clocks())) == before


def test_state_survives_a_dynamo_reset() -> None:
    """Compiling again does not lose the generation, nor does it use masks of another one."""
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
    assert lite_compile.stats(model).streams[0].steps == 6


def test_two_compilations_of_one_model_share_its_state() -> None:
    """HunyuanVideo in bf16 compiles twice: its timestep is fp32 at the first call only."""
    model = tiny_wan()
    expected = denoise(compiled(tiny_wan()), noise(0), [prompt(0)], 6)
    runs = [compiled(model), torch.compile(model, backend="liteattention", options={**OPTIONS, "inner": "aot_eager"})]
    calls = 0

    def alternating(**kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return runs[calls % 2](**kwargs)

    result = denoise(alternating, noise(0), [prompt(0)], 6)
    assert (result - expected).norm() < TOLERANCE * expected.norm()
    assert {s.steps for s in lite_compile.stats(model).streams} == {6}


def test_copies_do_not_share_a_mask() -> None:
    import copy

    model = tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 4, stop_after=2)
    clone = copy.deepcopy(model)
    assert list(layer_states(model_parameters(clone))) == []


def test_two_threads_run_two_models() -> None:
    expected = [denoise(compiled(tiny_wan(seed)), noise(seed), [prompt(seed)], 4) for seed in (0, 1)]
    torch._dynamo.reset()
    results: dict[int, torch.Tensor] = {}
    runs = [compiled(tiny_wan(seed)) for seed in (0, 1)]

    def work(seed: int) -> None:
        results[seed] = denoise(runs[seed], noise(seed), [prompt(seed)], 4)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in (0, 1))


def test_moving_the_model_keeps_its_identity() -> None:
    """Offloading replaces the data of a parameter, not the parameter."""
    model = tiny_wan()
    run = compiled(model)
    denoise(run, noise(0), [prompt(0)], 4, stop_after=2)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        run(**arguments())
    assert len(clocks(model_parameters(model))) == 1


def test_explain_runs_nothing_and_leaves_no_trace() -> None:
    model = tiny_wan()
    before = lite_compile.report()
    result = lite_compile.explain(model, **arguments(), backend_options={"min_seq_len": 64})
    assert [site.decision for site in result.sites] == ["rewritten", "dense"] * 2
    assert lite_compile.report() == before
    assert list(layer_states(model_parameters(model))) == []
    short = lite_compile.explain(compiled(model), **arguments())
    assert {site.reason for site in short.sites if site.layer.endswith("attn2")} == {
        lite_compile.Reason.CROSS_ATTENTION
    }


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
            mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device)
            return self.attn(tokens, None, mask)

    run = torch.compile(Causal(), backend="liteattention", options={**OPTIONS, "on_unsupported": "error"})
    with torch.no_grad(), pytest.raises(lite_compile.UnsupportedAttentionError, match=r"'attn'.*attention mask"):
        run(torch.randn(1, 128, 64, device=DEVICE, dtype=DTYPE))
