"""What is caught of a running model, and what is computed from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import OPTIONS, compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile import ops
from lite_compile.attention_capture import AttentionCall, attention_map, given_attention
from lite_compile.layer_state import layer_states
from lite_compile.layer_stats import skip_mask
from lite_compile.skip_state import TileShape

PROMPTS = [prompt(0), prompt(1)]
LAYER = "blocks.1.attn1"


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def dense_operands(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """q and k of each self-attention of `LAYER`, both prompts, in the model as it is."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watch(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape == key.shape:
            found.append((query, key))
        return plain(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        denoise(tiny_wan(), noise(0), PROMPTS, steps)
    return found[1::2]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_operands_and_skipped_tiles_of_each_stream(inner: str) -> None:
    model = tiny_wan()
    run = compiled(model, inner=inner, history=True, threshold=-float("inf"))
    with lite_compile.capture_attention(model, LAYER) as calls:  # from the first call on
        denoise(run, noise(0), PROMPTS, 3)
    assert [(call.layer, call.stream, call.step) for call in calls] == [(LAYER, 0, 2), (LAYER, 1, 2)]
    for call, (q, k) in zip(calls, dense_operands(3)[-2:], strict=True):
        assert torch.allclose(call.q, q, rtol=1e-3, atol=1e-3)
        assert torch.allclose(call.k, k, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(calls[0].k, calls[1].k, rtol=1e-3, atol=1e-3)
    assert not ops.watchers


def test_skipped_tiles_are_those_of_that_step() -> None:
    model = tiny_wan()
    run = compiled(model, history=True)
    with lite_compile.capture_attention(model, LAYER, step=3) as calls:
        denoise(run, noise(0), PROMPTS, 6)
    history = {s.stream: s.history for s in lite_compile.stats(model).streams if s.layer == LAYER}
    assert [call.step for call in calls] == [3, 3]
    for call in calls:
        assert call.density == pytest.approx(history[call.stream][3], abs=1e-12)
        assert history[call.stream][3] != history[call.stream][5]


def test_errors_name_what_there_is() -> None:
    model = tiny_wan()
    run = compiled(model)
    with pytest.raises(ValueError, match="no layer that uses liteattention yet"), _capture(model, "blocks.9.attn1"):
        pass
    unknown = pytest.raises(ValueError, match=r"'blocks.9.attn1'; allowed: .*Did you mean 'blocks.\d.attn1'")
    with unknown, _capture(model, "blocks.9.attn1"):  # known only once the model has run
        denoise(run, noise(0), PROMPTS, 2)
    with pytest.raises(ValueError, match=r"blocks.0.attn1, blocks.1.attn1\. Did you mean"), _capture(model, "blocks.1"):
        raise AssertionError("not reached")
    not_taken = pytest.raises(ValueError, match="step is 7; allowed: one that was taken, 0 to 1")
    with not_taken, lite_compile.capture_attention(model, LAYER, step=7):
        denoise(run, noise(1), PROMPTS, 2)
    with pytest.raises(RuntimeError, match="reduce-overhead"), _capture(model, LAYER):
        pass
    with pytest.raises(KeyError, match="the user's own"), _capture(model, LAYER):
        raise KeyError("the user's own")
    assert not ops.watchers


def _capture(model: torch.nn.Module, layer: str) -> Any:
    return lite_compile.capture_attention(model, layer)


def test_a_map_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1100, 16, generator=generator)
    k = torch.randn(2, 2, 600, 16, generator=generator)
    bias = torch.zeros(1, 600)
    bias[0, 500:] = -torch.inf
    tile = TileShape(128, 64)
    skipped = torch.rand(2, 4, 9, 10, generator=generator) < 0.3
    call = AttentionCall("attn", 0, 0, q, k, bias, 0.25, tile, skipped)
    weights, rows, columns, mean_lost, max_lost = attention_map(call, batch=1, head=3)

    exact = (q[1, 3].double() @ k[1, 1].double().T * 0.25 + bias.double()).softmax(-1)
    assert (rows, columns) == (3, 2)
    assert weights.shape == (367, 300)
    expected = exact[3 * 20 : 3 * 21, 2 * 100 : 2 * 101].mean() * 600
    assert float(weights[20, 100]) == pytest.approx(float(expected), rel=1e-4)
    last = exact[3 * 366 :, 2 * 10 : 2 * 11].mean() * 600  # 1,100 rows are 366 cells of 3 and one of 2
    assert float(weights[366, 10]) == pytest.approx(float(last), rel=1e-4)
    lost = (exact * skipped[1, 3].repeat_interleave(128, 0).repeat_interleave(64, 1)[:1100, :600]).sum(1)
    assert mean_lost == pytest.approx(float(lost.mean()), rel=1e-4)
    assert max_lost == pytest.approx(float(lost.max()), rel=1e-4)
    assert not weights[:, 250:].any()


def test_operands_that_are_given() -> None:
    model = tiny_wan()
    denoise(torch.compile(model, backend="liteattention", options=OPTIONS), noise(0), PROMPTS, 4)
    q, k = torch.randn(2, 1, 2, 1024, 32)
    call = given_attention(model, LAYER, q, k, stream=1)
    (state,) = [state for state in layer_states(model) if state.layer == LAYER]
    assert torch.equal(call.skipped, skip_mask(state, 1))
    assert call.skipped.any()
    assert call.scale == pytest.approx(32**-0.5)
    with pytest.raises(
        ValueError, match=r"q is \(1, 2, 1024, 32\), k \(1, 2, 1000, 32\); allowed .*q \[1, 2, 1024, D\]"
    ):
        given_attention(model, LAYER, q, k[:, :, :1000])
    with pytest.raises(ValueError, match="stream is 4; allowed: 0 to 3"):
        given_attention(model, LAYER, q, k, stream=4)
    with pytest.raises(ValueError, match=r"Did you mean 'blocks.1.attn1'"):
        given_attention(model, "blocks.1.attn", q, k)
    for batch, head, message in ((1, 0, "batch is 1; allowed: 0 to 0"), (0, -1, "head is -1; allowed: 0 to 1")):
        with pytest.raises(ValueError, match=message):
            attention_map(call, batch, head)
