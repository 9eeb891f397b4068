from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import DIM, Denoiser, capture, inputs
from models import LATENTS, noise, prompt, tiny_wan
from torch import Tensor, nn

import lite_compile
from lite_compile import Reason
from lite_compile.backend import find_clock
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_clock_inputs import ClockInputs, find_clock_inputs, find_unreadable
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


class Images(nn.Module):
    """Latents and prompts as lists with one entry per image, as Z-Image takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser(cross=True)

    def forward(self, x: list[Tensor], t: Tensor, prompts: list[Tensor]) -> list[Tensor]:
        return list(self.inner(torch.cat(x), t, torch.cat(prompts)).split(1))


class PositionalImages(Images):
    def forward(self, *args: Any) -> list[Tensor]:
        return super().forward(*args)


@pytest.mark.parametrize(("model", "source"), [(Images(), "L['x']"), (PositionalImages(), "L['args'][0]")])
def test_latents_in_a_list(model: nn.Module, source: str) -> None:
    latents, t, prompts = inputs(batch=3)
    clock = find(model, list(latents.split(1)), t, list(prompts.split(1)))
    assert isinstance(clock, ClockInputs)
    images = [source_name(n) for n in (clock.latents, *clock.more_latents)]
    assert sorted(images) == [f"{source}[{i}]" for i in range(3)]
    assert len(clock.conditions) == 3


class Packed(nn.Module):
    """All arguments in one list: what is not of the latents' shape stays conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser(cross=True)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.inner(*inputs)


def test_a_prompt_beside_the_latents_in_a_list_is_conditioning() -> None:
    latents, t, prompts = inputs(batch=2)
    clock = find(Packed(), [latents, t, torch.cat([prompts, prompts], 1)])
    assert isinstance(clock, ClockInputs)
    assert (source_name(clock.latents), clock.more_latents) == ("L['inputs'][0]", ())
    assert [source_name(n) for n in clock.conditions] == ["L['inputs'][2]"]


class Audiovisual(nn.Module):
    """Sound is denoised together with the picture, as in LTX2."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, hidden_states: Tensor, audio_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(torch.cat([hidden_states, audio_hidden_states], 1), timestep, hidden_states)
        return out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]


def test_sound_is_no_conditioning() -> None:
    latents, t, _ = inputs()
    clock = find(Audiovisual(), latents, latents[:, :8].clone(), t)
    assert isinstance(clock, ClockInputs)
    assert (argument_name(clock.latents), clock.conditions) == ("hidden_states", ())
    assert [argument_name(n) for n in clock.more_latents] == ["audio_hidden_states"]


class Refined(nn.Module):
    """The prompt is refined by attention, and then the graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = Denoiser()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states * 2, self.refiner(encoder_hidden_states, timestep, hidden_states)


def test_a_prompt_with_attention_of_its_own_is_not_the_latents() -> None:
    latents, t, prompts = inputs()
    clock = find(Refined(), latents, t, prompts)
    assert isinstance(clock, ClockInputs)
    assert argument_name(clock.latents) == "hidden_states"
    assert [argument_name(n) for n in clock.conditions] == ["encoder_hidden_states"]


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


class Guided(nn.Module):
    """`guidance` is embedded like a timestep, which is a Python number here."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, hidden_states: Tensor, timestep: float, guidance: Tensor) -> Tensor:
        return self.inner(hidden_states, guidance, hidden_states) * timestep


def test_guidance_is_not_a_timestep() -> None:
    latents, scale, _ = inputs()
    assert find(Guided(), latents, 3.0, scale) == "no tensor input looks like a timestep"


class Conditioned(nn.Module):
    """Conditioning of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()
        self.context = torch.ones(1, 1, DIM)
        self.register_buffer("table", torch.ones(1, 1, DIM))

    def forward(self, hidden_states: Tensor, timestep: Tensor, learned: Tensor, waves: Tensor, label: int) -> Tensor:
        x = self.inner(hidden_states + learned + self.context + self.table, timestep, learned)
        return x * waves.real * label


def test_all_that_may_carry_a_prompt_is_conditioning() -> None:
    latents, t, _ = inputs()
    waves = torch.ones(1, 1, DIM, dtype=torch.complex64)
    clock = find(Conditioned(), latents, t, nn.Parameter(torch.ones(1, 1, DIM)), waves, 3, dynamic=True)
    assert isinstance(clock, ClockInputs)
    sources = {source_name(n) for n in clock.conditions}
    assert {"L['learned']", "L['waves']", "L['label']", "L['self'].context"} <= sources
    assert not any("_parameters" in name or "_buffers" in name for name in sources)


class Extra(nn.Module):
    """Conditioning of a kind of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, hidden_states: Tensor, timestep: Tensor, extra: Tensor) -> Tensor:
        prompt = extra.values() if extra.is_nested else extra
        return self.inner(hidden_states, timestep, hidden_states) + prompt.sum()


def jagged() -> Tensor:
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def test_nested_conditioning_leaves_no_clock_and_runs() -> None:
    latents, t, _ = inputs()
    gm = capture(Extra(), latents, t, jagged())
    assert find_unreadable(gm) == "the clock cannot read 'extra': nested tensor"
    assert find_unreadable(capture(Extra(), latents, t, torch.ones(3))) is None
    model = Extra()
    compiled = torch.compile(model, backend="liteattention", options={"inner": "aot_eager", "min_seq_len": 16})
    with torch.no_grad():
        torch.testing.assert_close(compiled(latents, t, jagged()), model(latents, t, jagged()))
        torch._dynamo.reset()
        with lite_compile.generation(model):
            torch.testing.assert_close(compiled(latents, t, jagged()), model(latents, t, jagged()))
    for graph in lite_compile.report().graphs[-2:]:
        (site,) = graph.sites
        assert (site.reason, site.detail) == (Reason.NO_CLOCK, "the clock cannot read 'extra': nested tensor")


def test_conditioning_that_cannot_be_traced_leaves_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError("no such\nthing")

    monkeypatch.setattr("lite_compile.passes.find_clock_inputs.identify", refuse)
    gm = capture(Denoiser(), *inputs())
    assert str(find_unreadable(gm)).endswith("': NotImplementedError: no such")
    clock, text = find_clock(gm, find_attention(gm))
    assert (clock, text) == (None, find_unreadable(gm))


def test_every_kind_of_plain_conditioning_can_be_read() -> None:
    latents, t, _ = inputs()
    for dtype in (torch.bool, torch.int64, torch.float64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn):
        extra = torch.ones(3, 4).to(dtype)
        for view in (extra.t(), extra[:0], extra.expand(2, 3, 4)):
            gm = capture(Read(), latents, t, view)
            assert find_unreadable(gm) is None


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()

    def forward(self, hidden_states: Tensor, timestep: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(hidden_states, timestep, hidden_states), extra.clone()


@pytest.mark.parametrize("empty", ["hidden_states", "timestep"])
def test_empty_inputs_are_neither_latents_nor_timestep(empty: str) -> None:
    latents, t, prompts = inputs()
    arguments = {"hidden_states": latents, "timestep": t, "prompt": prompts}
    arguments[empty] = arguments[empty][:0]
    clock = find(Denoiser(), **arguments)
    assert (
        clock
        == {
            "hidden_states": "no input looks like latents",
            "timestep": "no tensor input looks like a timestep",
        }[empty]
    )
