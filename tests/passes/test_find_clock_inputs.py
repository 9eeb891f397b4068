from __future__ import annotations

from typing import Any

import torch
from graphs import DIM, Denoiser, capture, inputs
from models import LATENTS, noise, prompt, tiny_wan
from torch import Tensor, nn

from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_clock_inputs import ClockInputs, find_clock_inputs
from lite_compile.passes.graph_inputs import argument_name, source_name


def find(model: Any, *args: Any, **kwargs: Any) -> ClockInputs | str:
    gm = capture(model, *args, **kwargs)
    return find_clock_inputs(gm, find_attention(gm))


def test_by_name() -> None:
    clock = find(Denoiser(), *inputs())
    assert isinstance(clock, ClockInputs)
    assert [argument_name(n) for n in (clock.latents, clock.timestep)] == ["hidden_states", "timestep"]


def test_wan_by_keyword_and_by_position() -> None:
    arguments = {"hidden_states": noise(0), "timestep": torch.tensor([999]), "encoder_hidden_states": prompt(0)}
    named = find(tiny_wan(layers=1), **arguments)
    assert isinstance(named, ClockInputs)
    assert str(named) == "latents from 'hidden_states', timestep from 'timestep', 1 conditioning inputs"
    positional = find(tiny_wan(layers=1), *arguments.values())
    assert isinstance(positional, ClockInputs)
    sources = [source_name(n) for n in (positional.latents, positional.timestep, *positional.conditions)]
    assert sources == ["L['args'][0]", "L['args'][1]", "L['args'][2]"]


def test_timestep_per_token() -> None:
    tokens = LATENTS[2] * 16 * 16
    clock = find(
        tiny_wan(layers=1),
        hidden_states=noise(0),
        timestep=torch.full((1, tokens), 999),
        encoder_hidden_states=prompt(0),
    )
    assert isinstance(clock, ClockInputs)
    assert argument_name(clock.timestep) == "timestep"


class Unnamed(nn.Module):
    """Arguments whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        return self.inner(second, third, first)


def test_by_data_flow() -> None:
    latents, t, prompts = inputs()
    clock = find(Unnamed(), prompts, latents, t)
    assert isinstance(clock, ClockInputs)
    assert [argument_name(n) for n in (clock.latents, clock.timestep)] == ["second", "third"]


class AdaLayerNormBlock(nn.Module):
    """A block, compiled by itself: its `timestep` is an embedding, not a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.inner.attn(hidden_states * self.proj(timestep)[:, None])


def test_an_embedding_is_not_a_timestep() -> None:
    clock = find(AdaLayerNormBlock(), inputs()[0], torch.ones(1, DIM))
    assert clock == "no tensor input looks like a timestep"


def test_nothing_looks_like_latents() -> None:
    class Flat(nn.Module):
        def forward(self, ids: Tensor, timestep: Tensor) -> Tensor:
            return ids * timestep

    assert find(Flat(), torch.arange(4), torch.ones(1)) == "no input looks like latents"


class Controlled(nn.Module):
    """A control network's residuals change from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, controlnet_residual: Tensor) -> Tensor:
        return self.inner(hidden_states + controlnet_residual, timestep, prompt) + prompt


def test_inputs_that_change_every_step_do_not_identify_a_stream() -> None:
    latents, t, prompts = inputs()
    clock = find(Controlled(), latents, t, prompts, prompts.clone())
    assert isinstance(clock, ClockInputs)
    assert [argument_name(n) for n in clock.conditions] == ["prompt"]
