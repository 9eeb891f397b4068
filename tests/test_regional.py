"""Blocks compiled one by one, and graphs that break: state per layer, and one clock kept by hooks on the model."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import DIM, Attention
from models import DEVICE, DTYPE, OPTIONS, TOLERANCE, denoise, noise, prompt, timesteps, tiny_wan
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lite_compile
from lite_compile import find_root, root_clock
from lite_compile.advance_clock import ClockRules
from lite_compile.layer_state import layer_states

PROMPTS = [prompt(0), prompt(1)]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()
    lite_compile.clear_report()


def compile_blocks(model: Any, **options: Any) -> Any:
    """What diffusers' regional compilation does."""
    model.compile_repeated_blocks(backend="liteattention", fullgraph=True, options={**OPTIONS, **options})
    return model


def compile_whole(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="liteattention", fullgraph=True, options={**OPTIONS, **options})


def distance(ours: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((ours - expected).norm() / expected.norm())


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {state.layer: state.state.clone() for state in layer_states(model)}


def test_blocks_compiled_one_by_one_do_what_the_whole_model_does() -> None:
    whole, regional = tiny_wan(layers=3), tiny_wan(layers=3)
    runs = {}
    for model, run in ((whole, compile_whole(whole)), (regional, compile_blocks(regional))):
        runs[model] = [denoise(run, noise(seed), PROMPTS, 6) for seed in (0, 1)]
    for ours, expected in zip(runs[regional], runs[whole], strict=True):
        assert distance(ours, expected) < TOLERANCE
    assert lite_compile.stats(regional).density < 0.9
    assert masks(regional).keys() == masks(whole).keys() == {f"blocks.{n}.attn1" for n in range(3)}
    ours, expected = lite_compile.stats(regional).streams, lite_compile.stats(whole).streams
    assert {(s.layer, s.stream, s.steps, s.generations) for s in ours} == {
        (s.layer, s.stream, s.steps, s.generations) for s in expected
    }
    densities = {(s.layer, s.stream): s.density for s in expected}
    assert all(abs(s.density - densities[s.layer, s.stream]) < 0.02 for s in ours)


def test_one_graph_serves_all_blocks_and_the_report_says_who_keeps_the_clock() -> None:
    model = compile_blocks(tiny_wan(layers=4))
    denoise(model, noise(0), PROMPTS, 5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    (graph,) = lite_compile.report().graphs
    assert [(site.layer, site.rewritten) for site in graph.sites] == [("attn1", True), ("attn2", False)]
    assert graph.clock == ("hooks on WanTransformer3DModel: latents from 'hidden_states', timestep from 'timestep'")
    assert len({state.state.data_ptr() for state in layer_states(model)}) == 4


def test_a_second_generation_equals_the_same_one_on_fresh_state() -> None:
    used, fresh = compile_blocks(tiny_wan()), compile_blocks(tiny_wan())
    denoise(used, noise(0), PROMPTS, 6, stop_after=4)
    second = denoise(used, noise(1), [prompt(2), prompt(3)], 6)
    assert torch.equal(second, denoise(fresh, noise(1), [prompt(2), prompt(3)], 6))


def test_two_models_that_share_a_graph_share_no_mask() -> None:
    one, other, alone = compile_blocks(tiny_wan(0)), compile_blocks(tiny_wan(1)), compile_blocks(tiny_wan(1))
    latents = {model: noise(number) for number, model in enumerate((one, other))}
    with torch.no_grad():
        for step in range(5):
            t = torch.tensor([1000.0 - 200 * step], device=DEVICE)
            for model, x in latents.items():
                for p in PROMPTS:
                    v = model(hidden_states=x, timestep=t, encoder_hidden_states=p, return_dict=False)[0]
                latents[model] = x - 0.2 * v
    x = noise(1)
    with torch.no_grad():
        for step in range(5):
            t = torch.tensor([1000.0 - 200 * step], device=DEVICE)
            for p in PROMPTS:
                v = alone(hidden_states=x, timestep=t, encoder_hidden_states=p, return_dict=False)[0]
            x = x - 0.2 * v
    assert torch.equal(latents[other], x)


def test_a_block_called_by_itself_uses_no_state() -> None:
    model = compile_blocks(tiny_wan())
    denoise(model, noise(0), PROMPTS, 6)
    block, plain = model.blocks[0], tiny_wan().blocks[0]
    cos, sin = model.rope(noise(0))
    hidden, context = torch.randn(1, 1024, 64).to(noise(0)), torch.randn(1, 8, 64).to(noise(0))
    temb = torch.randn(1, 6, 64, device=DEVICE)
    before = masks(model)
    with torch.no_grad():
        out = block(hidden, context, temb, (cos, sin))
        expected = plain(hidden, context, temb, (cos, sin))
    assert distance(out, expected) < TOLERANCE
    assert all(torch.equal(state, before[name]) for name, state in masks(model).items())


class Guided(nn.Module):
    """A module around a denoiser that calls it for both prompts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, t: Tensor, prompts: list[Tensor]) -> Tensor:
        calls = [
            self.model(hidden_states=latents, timestep=t, encoder_hidden_states=p, return_dict=False)[0]
            for p in prompts
        ]
        return calls[1] + 3 * (calls[0] - calls[1])


def test_guidance_inside_of_an_outer_module_keeps_its_streams_apart() -> None:
    model, reference = compile_blocks(tiny_wan()), compile_blocks(tiny_wan())
    guided, x = Guided(model), noise(0)
    with torch.no_grad():
        for step in range(6):
            x = x - guided(x, torch.tensor([1000 * (1 - step / 6)], device=DEVICE), PROMPTS) / 6
    assert distance(x, denoise(reference, noise(0), PROMPTS, 6)) < TOLERANCE
    assert {s.stream for s in lite_compile.stats(model).streams} == {0, 1}


class SharedBlock(nn.Module):
    """Applies one block twice."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.model.blocks = nn.ModuleList([self.model.blocks[0]] * 2)


def test_a_block_that_runs_twice_per_call_uses_its_state_once() -> None:
    shared = SharedBlock(tiny_wan()).model
    exact, model = copy.deepcopy(shared), compile_blocks(shared, threshold=-float("inf"))
    assert distance(denoise(model, noise(0), PROMPTS, 3), denoise(exact, noise(0), PROMPTS, 3)) < TOLERANCE
    assert all(s.density == 1 for s in lite_compile.stats(model).streams)


class Breaking(nn.Module):
    """A denoiser whose graph breaks before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_wan()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> Any:
        scale = 1.0 + 0 * float(hidden_states.sum())
        torch._dynamo.graph_break()
        return (self.inner(hidden_states * scale, timestep.tolist()[0] + 0 * timestep, encoder_hidden_states)[0],)


def test_graphs_after_a_break_follow_the_clock_of_the_call() -> None:
    model, whole = Breaking().eval(), tiny_wan()
    run = torch.compile(model, backend="liteattention", options=OPTIONS)
    results = [denoise(run, noise(seed), PROMPTS, 6) for seed in (0, 1)]
    expected = [denoise(compile_whole(whole), noise(seed), PROMPTS, 6) for seed in (0, 1)]
    for ours, other in zip(results, expected, strict=True):
        assert distance(ours, other) < TOLERANCE
    assert lite_compile.stats(model).density < 0.9, str(lite_compile.report())


def test_an_exception_inside_of_a_call_leaves_nothing_behind() -> None:
    model, fresh = compile_blocks(tiny_wan()), compile_blocks(tiny_wan())
    denoise(model, noise(0), PROMPTS, 2)
    handle = model.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        denoise(model, noise(0), PROMPTS, 2)
    handle.remove()
    root = root_clock.root_of(model)
    assert root is not None
    assert root.call is None
    assert torch.equal(denoise(model, noise(1), PROMPTS, 5), denoise(fresh, noise(1), PROMPTS, 5))


def test_copies_and_pickles_of_a_model_start_without_a_clock() -> None:
    model = compile_blocks(tiny_wan())
    first = denoise(model, noise(0), PROMPTS, 5)
    twin = copy.deepcopy(model)
    torch.save(model.state_dict(), io.BytesIO())
    assert len(twin._forward_pre_hooks) == 1
    assert torch.equal(denoise(compile_blocks(twin), noise(0), PROMPTS, 5), first)
    assert layer_states(twin)[0].clock is not layer_states(model)[0].clock
    buffer = io.BytesIO()
    torch.save(next(iter(model._forward_pre_hooks.values())), buffer)


@pytest.mark.parametrize("calls", [1, 2])
def test_the_model_takes_its_clock_along(calls: int) -> None:
    model = compile_blocks(tiny_wan())
    denoise(model, noise(0), PROMPTS[:1], calls)
    clock, freed = weakref.ref(layer_states(model)[0].clock), weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert clock() is None
    assert freed() is None


def test_weights_outside_of_the_compiled_blocks_are_watched() -> None:
    """As in a whole model: what they do to the tokens decides what is negligible in every block."""
    used, fresh = compile_blocks(tiny_wan()), compile_blocks(tiny_wan())
    latents = denoise(used, noise(0), PROMPTS[:1], 6, stop_after=4)
    assert lite_compile.stats(used).density < 1
    call = {"timestep": torch.tensor([300.0], device=DEVICE), "encoder_hidden_states": PROMPTS[0], "return_dict": False}
    with torch.no_grad():
        for model in (used, fresh):
            model.patch_embedding.weight.mul_(-1.5)
        assert torch.equal(used(latents, **call)[0], fresh(latents, **call)[0])


def test_excluded_layers_are_known_by_their_full_names() -> None:
    model = compile_blocks(tiny_wan(layers=3), exclude_layers=["blocks.1.*"])
    denoise(model, noise(0), PROMPTS, 6)
    assert {s.layer for s in lite_compile.stats(model).streams} == {"blocks.0.attn1", "blocks.2.attn1"}
    included = compile_blocks(tiny_wan(layers=3), layers=["blocks.2.*"])
    denoise(included, noise(0), PROMPTS, 6)
    assert {s.layer for s in lite_compile.stats(included).streams} == {"blocks.2.attn1"}


def test_attention_compiled_alone_has_its_full_name_as_well() -> None:
    model = tiny_wan(layers=3)
    for block in model.blocks:
        block.attn1 = torch.compile(
            block.attn1, backend="liteattention", options={**OPTIONS, "exclude_layers": ["blocks.1.attn1"]}
        )
    denoise(model, noise(0), PROMPTS, 3)
    assert {s.layer for s in lite_compile.stats(model).streams} == {"blocks.0.attn1", "blocks.2.attn1"}


def test_reset_starts_a_generation() -> None:
    model, fresh = compile_blocks(tiny_wan()), compile_blocks(tiny_wan())
    denoise(model, noise(0), PROMPTS, 6, stop_after=3)
    lite_compile.reset(model)
    assert torch.equal(denoise(model, noise(0), PROMPTS, 6), denoise(fresh, noise(0), PROMPTS, 6))


def test_a_whole_model_compiled_later_ignores_the_hooks() -> None:
    model = compile_blocks(tiny_wan())
    denoise(model, noise(0), PROMPTS, 3)
    for block in model.blocks:
        block._compiled_call_impl = None
    torch._dynamo.reset()
    counters.clear()
    run = compile_whole(model)
    result = denoise(run, noise(1), PROMPTS, 5)
    assert not counters["graph_break"]
    assert torch.equal(result, denoise(compile_whole(tiny_wan()), noise(1), PROMPTS, 5))


def test_latents_in_lists_and_sound_beside_them() -> None:
    class Model(nn.Module):
        def forward(self, x: list[Tensor], t: Tensor, prompts: list[Tensor], audio_latents: Tensor) -> None: ...

    x, sound, prompts = [noise(0), noise(1)], noise(2), [prompt(0), prompt(1)]
    found = find_root.read_arguments(Model(), (x, 0.5, prompts), {"audio_latents": sound})
    assert isinstance(found, find_root.ClockArguments)
    assert list(map(id, found.latents)) == list(map(id, [*x, sound]))
    assert list(map(id, found.conditions)) == list(map(id, prompts))
    mixed = find_root.read_arguments(Model(), ([noise(0), 3], 0.5, prompts, sound), {})
    assert mixed == "no argument is named like latents"


def test_a_model_without_timestep_says_what_is_missing() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.compile(tiny_wan().blocks[0].attn1, backend="liteattention", options=OPTIONS)

        def forward(self, tokens: Tensor) -> Any:
            return self.block(tokens)

    with torch.no_grad():
        Plain()(torch.randn(1, 256, 64).to(noise(0)))
    (site,) = lite_compile.report().sites
    assert site.reason is lite_compile.Reason.NO_CLOCK
    assert "by these names" in site.detail


def test_a_block_that_is_given_an_embedded_timestep_keeps_no_clock() -> None:
    """Its numbers do not fall from step to step, and tokens of two videos correlate."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.compile(tiny_wan().blocks[0].attn1, backend="liteattention", options=OPTIONS)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return x + self.attn(x * t[:, None])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, tokens: Tensor, when: Tensor) -> Any:
            return self.block(tokens, (when[:, None] * torch.ones(64, device=DEVICE)).cos().to(tokens))

    with torch.no_grad():
        Model()(torch.randn(1, 256, 64).to(noise(0)), torch.tensor([1000.0], device=DEVICE))
    (site,) = lite_compile.report().sites
    assert site.reason is lite_compile.Reason.NO_CLOCK


@pytest.mark.parametrize("dense_layers", [(0, 0), (1, 0)])
def test_blocks_of_another_model_do_not_follow_the_clock_of_the_one_that_calls_it(
    dense_layers: tuple[int, int],
) -> None:
    """Nor are they its layers, of which some may be counted."""
    model, alone = (compile_blocks(tiny_wan(), dense_layers=dense_layers) for _ in range(2))
    other, exact = compile_blocks(tiny_wan(1), dense_layers=dense_layers), tiny_wan(1)
    x, y = noise(2), noise(3)
    results: list[Tensor] = []

    def call_other(*_: Any) -> None:
        call = {"hidden_states": y, "timestep": torch.tensor([500.0], device=DEVICE)}
        call |= {"encoder_hidden_states": prompt(2 + len(results)), "return_dict": False}
        results.append(other(**call)[0])
        assert distance(results[-1], exact(**call)[0]) < TOLERANCE

    handle = model.proj_out.register_forward_pre_hook(call_other)  # by then the model is a root
    with pytest.warns(UserWarning, match="WanTransformer3DModel calls a block that is not one of its submodules"):
        ours = denoise(model, x, PROMPTS[:1], 5)
    handle.remove()
    assert len(results) == 5
    assert root_clock.root_of(other) is None  # or this tests nothing
    assert all(stream.density == 1 for stream in lite_compile.stats(other).streams)
    assert torch.equal(ours, denoise(alone, x, PROMPTS[:1], 5))
    root = root_clock.root_of(model)
    assert root is not None
    assert root.layers == ("blocks.0.attn1", "blocks.1.attn1")
    denoise(other, y, PROMPTS[:1], 5)
    assert lite_compile.stats(other).density < 1
    assert {stream.layer for stream in lite_compile.stats(other).streams} == {"blocks.0.attn1", "blocks.1.attn1"}


class Masked(nn.Module):
    """Compiles its attention by itself and gives it a mask over keys, bool `[1, 1, 1, S]`, made from the timestep."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.mask = Attention(), mask

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.block(hidden_states, self.mask(timestep))

    def block(self, x: Tensor, mask: Tensor) -> Tensor:
        self.attn.attend = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.attn(x)


@pytest.mark.parametrize("changes", [True, False])
def test_a_mask_that_a_block_is_given_has_to_stay_as_it_is(changes: bool) -> None:
    quarters = torch.arange(512, device=DEVICE) // 128

    def mask(timestep: Tensor) -> Tensor:
        return (quarters != (timestep // 100 % 4 if changes else 3))[None, None, None]

    model, dense = (Masked(mask).to(DEVICE, DTYPE).eval() for _ in range(2))
    options = {**OPTIONS, "threshold": -math.inf}
    model.block = torch.compile(model.block, backend="liteattention", fullgraph=True, options=options)
    latents = torch.randn(1, 512, DIM, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    with torch.no_grad():
        for t in timesteps(10):
            x = latents * (1 + t / 5000).to(DTYPE)
            assert distance(model(x, t), dense(x, t)) < TOLERANCE
    assert [site.rewritten for site in lite_compile.report()] == [True]
    (stream,) = lite_compile.stats(model).streams
    assert stream.steps == 10
    assert stream.density == 0.75  # every fourth step, the mask is that of the first one again


class Conditioned(nn.Module):
    """Calls the blocks itself, and is given something more."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Any, prompt: Tensor, extra: Any) -> Tensor:
        model = self.model
        freqs, x = model.rope(hidden_states), model.patch_embedding(hidden_states).flatten(2).mT
        time = torch.ones(1, device=DEVICE)
        temb, projected, text, _ = model.condition_embedder(time, prompt, None)
        for block in model.blocks:
            x = block(x, text, projected.unflatten(1, (6, -1)), freqs)
        return x + temb[:, None]


@pytest.mark.parametrize(
    ("timestep", "extra", "rewritten"),
    [
        (1000.0, 2**70, True),
        (1000.0, -(10**400), True),
        (1000.0, float("nan"), True),
        (1000.0, torch.empty(3, device="meta"), False),
        (10**400, None, False),
        (torch.empty(1, device="meta"), None, False),
    ],
    ids=["large", "huge", "nan", "meta", "huge timestep", "meta timestep"],
)
def test_arguments_that_no_tensor_of_the_clock_can_hold(timestep: Any, extra: Any, rewritten: bool) -> None:
    model = Conditioned(compile_blocks(tiny_wan()))
    with torch.no_grad():
        for step in range(2):
            assert model(noise(0) * (1 - 0.1 * step), timestep, prompt(0), extra).isfinite().all()
    assert bool(lite_compile.report().rewritten) is rewritten


@pytest.mark.parametrize("kind", ["sparse", "csr"])
def test_conditioning_that_the_clock_cannot_read_leaves_blocks_dense(kind: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = compile_blocks(tiny_wan())

        def forward(self, hidden_states: Tensor, timestep: Tensor, table: Tensor, prompt: Tensor) -> Tensor:
            model = self.model
            scale = table.to_dense().sum()
            freqs, x = model.rope(hidden_states), model.patch_embedding(hidden_states * scale).flatten(2).mT
            temb, projected, text, _ = model.condition_embedder(timestep, prompt, None)
            for block in model.blocks:
                x = block(x, text, projected.unflatten(1, (6, -1)), freqs)
            return x + temb[:, None]

    model = Sparse().eval()
    table = torch.eye(4, device=DEVICE)
    table = table.to_sparse() if kind == "sparse" else table.to_sparse_csr()
    with torch.no_grad():
        for t in (1000.0, 900.0):
            out = model(noise(0) * t / 1000, torch.tensor([t], device=DEVICE), table, prompt(0))
    assert out.isfinite().all()
    sites = [site for site in lite_compile.report().sites if site.layer.endswith("attn1")]
    assert {site.reason for site in sites} == {lite_compile.Reason.NO_CLOCK}


def test_a_mask_written_to_under_inference_mode_is_read_anew() -> None:
    """Nobody counts what is written to such a tensor."""
    clock = root_clock.RootClock(1, ClockRules(1, DEVICE))
    with torch.inference_mode():
        mask = torch.zeros(1, 8, device=DEVICE)
        before = clock.identify([mask]).clone()
        mask[0, 3] = -1.0
        assert not torch.equal(clock.identify([mask]), before)
