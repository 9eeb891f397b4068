"""The option `history`: the density of each step, written by the graph, read by `stats()`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import DEVICE, DTYPE, OPTIONS, compiled, denoise, noise, prompt, tiny_wan
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import lite_compile
from lite_compile.density_history import HISTORY_STEPS, history_shape, read_history, record_density
from lite_compile.layer_state import layer_states

PROMPTS = [prompt(0), prompt(1)]
Histories = dict[tuple[str, int], tuple[float | None, ...]]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def histories(model: nn.Module) -> Histories:
    return {(s.layer, s.stream): s.history for s in lite_compile.stats(model).streams}


def densities(model: nn.Module) -> dict[tuple[str, int], float]:
    return {(s.layer, s.stream): s.density for s in lite_compile.stats(model).streams}


def watched(model: nn.Module, run: Any, latents: Tensor, prompts: Sequence[Tensor], steps: int) -> Histories:
    """Denoise, with the densities that `stats()` gives after each step."""
    seen: dict[tuple[str, int], list[float | None]] = {}

    def call(**arguments: Any) -> Any:
        result = run(**arguments)
        if arguments["encoder_hidden_states"] is prompts[-1]:
            for key, density in densities(model).items():
                seen.setdefault(key, []).append(density)
        return result

    denoise(call, latents, prompts, steps)
    return {key: tuple(values) for key, values in seen.items()}


def test_history_is_what_stats_gave_after_each_step_and_void_in_a_new_generation() -> None:
    model = tiny_wan()
    run = compiled(model, history=True)
    for seed, steps in ((0, 6), (1, 4)):
        seen = watched(model, run, noise(seed), PROMPTS, steps)
        assert histories(model) == seen
        assert all(len(values) == steps and values[0] == 1.0 for values in seen.values())
        assert min(values[-1] for values in seen.values()) < 1
    assert seen.keys() == {(f"blocks.{layer}.attn1", stream) for layer in range(2) for stream in range(2)}


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    model = tiny_wan()
    denoise(compiled(model), noise(0), PROMPTS, 3)
    assert set(histories(model).values()) == {()}
    assert all(state.history is None for state in layer_states(model))


def test_under_inductor_nothing_is_copied_and_nothing_synchronises() -> None:
    model = tiny_wan()
    options = {**OPTIONS, "inner": "inductor", "history": True}
    run = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
    arguments = {
        "hidden_states": noise(0),
        "timestep": torch.tensor([1000.0], device=DEVICE),
        "encoder_hidden_states": prompt(0),
        "return_dict": False,
    }
    with torch.no_grad():
        _, codes = run_and_get_code(run, **arguments)
    code = "\n".join(codes)
    # state, now, scale, threshold, tile
    pattern = (
        r"lite_compile\.attend\.default\(.*?(\w+), \w+, [\d.]+, reinterpret_tensor\(\w+, \(\), \(\), \d\), \d+, \d+"
    )
    calls = re.findall(pattern, code)
    assert len(calls) == 2
    assert all(re.fullmatch(r"arg\d+_1", state) for state in calls), calls
    assert not re.search(r"empty_strided\w*\(\(4, 1, 2,[^)]*\), \([^)]*\), torch\.int32\)", code)  # no other state
    assert not re.search(rf"empty_strided\w*\(\(4, {HISTORY_STEPS},", code)  # nor another history
    assert ".item()" not in code
    assert "synchronize" not in code
    seen = watched(model, run, noise(1), PROMPTS, 5)
    assert histories(model) == seen
    assert min(values[-1] or 1 for values in seen.values()) < 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]


def test_blocks_compiled_one_by_one() -> None:
    whole, regional = tiny_wan(), tiny_wan()
    regional.compile_repeated_blocks(backend="liteattention", fullgraph=True, options={**OPTIONS, "history": True})
    for model, run in ((whole, compiled(whole, history=True)), (regional, regional)):
        for seed in (0, 1):
            assert watched(model, run, noise(seed), PROMPTS, 5) == histories(model)
    assert histories(regional) == histories(whole)


def test_each_shape_has_its_own_history() -> None:
    model = tiny_wan()
    run = torch.compile(
        model, backend="liteattention", fullgraph=True, dynamic=True, options={**OPTIONS, "history": True}
    )
    for height in (32, 48, 32):
        latents = noise(height, (1, 4, 4, height, 32))
        assert watched(model, run, latents, PROMPTS[:1], 4) == histories(model)


def test_generations_that_are_announced() -> None:
    class Plain(nn.Module):
        """Attention without latents or a timestep that a clock could find."""

        def __init__(self) -> None:
            super().__init__()
            self.to_qkv = nn.Linear(64, 192)

        def forward(self, tokens: Tensor) -> Tensor:
            q, k, v = self.to_qkv(tokens).view(1, -1, 3, 2, 32).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = Plain().eval().to(DEVICE, DTYPE)
    tokens = torch.randn(1, 256, 64).to(DEVICE, DTYPE)
    run = compiled(model, history=True)
    with torch.no_grad():
        for steps in (3, 2):
            with lite_compile.generation(model) as g:
                for _ in range(steps):
                    g.step()
                    run(tokens)
                run(tokens)  # not announced: dense, and no step
                assert [len(history) for history in histories(model).values()] == [steps]
                assert None not in next(iter(histories(model).values()))


def test_what_is_written_and_what_is_read() -> None:
    state = torch.zeros(2, 1, 3, 4, 5, dtype=torch.int32)
    state[1, ..., 1] = 7  # tiles computed
    history = torch.zeros(history_shape(2), dtype=torch.int64)

    def record(epoch: int, step: int, slot: int) -> None:
        record_density([history], [state], torch.tensor([epoch, step, slot, 1], dtype=torch.int32))

    record(9, 0, 1)
    record(9, 2, 1)
    record(9, 3, -1)  # no state was used
    record(9, HISTORY_STEPS, 1)  # beyond what is remembered
    assert int((history != 0).any(-1).sum()) == 2
    assert read_history(history[1], 9, 4, 168) == (0.5, None, 0.5, None)
    assert read_history(history[1], 10, 4, 168) == (None,) * 4  # an earlier generation
    assert read_history(history[1], 8, 4, 168) == (0.5, None, 0.5, None)  # marks were refreshed before
    assert read_history(history[0], 9, 2, 168) == (None,) * 2  # another stream
    assert len(read_history(history[1], 9, HISTORY_STEPS + 5, 168)) == HISTORY_STEPS


@pytest.mark.parametrize("value", [1, "yes", None])
def test_option_errors(value: Any) -> None:
    with pytest.raises(lite_compile.OptionTypeError, match=r"'history' is .*allowed: True or False"):
        lite_compile.Options(history=value)
