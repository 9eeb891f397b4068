"""The options `must_compute` and `must_skip`: what they may be, what the graph makes of them, and `set_ranges`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import DIM, Attention, Denoiser, capture, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from models import DEVICE, TOLERANCE, compiled, denoise, noise, prompt, tiny_wan
from test_protect import mark_everything
from test_regional import compile_blocks, compile_whole, distance
from test_thresholds import assert_same, masks
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lite_compile
from lite_compile import OptionTypeError, OptionValueError
from lite_compile.backend import rewrite_graph
from lite_compile.kernels.select_kernel import select_kernel
from lite_compile.key_ranges import KeyRanges, check_ranges, find_key_tiles, hide_keys, range_table
from lite_compile.layer_state import layer_states
from lite_compile.options import Options
from lite_compile.skip_state import COMPUTED_WORD, tile_count

TILE = select_kernel(torch.device("cpu"), torch.float32, 16).tile  # type: ignore[union-attr]
TOKENS = 330
PROMPTS = [prompt(0), prompt(1)]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()
    lite_compile.clear_report()


@pytest.mark.parametrize(
    ("given", "merged"),
    [
        (None, None),
        ([], ()),
        ([[5, 9], (0, 5)], ((0, 9),)),
        ([(0, 5), (3, None), (7, 9)], ((0, None),)),
        ([(-9, None), (-20, -9), (-5, -2)], ((-20, None),)),
        ([(-9, -3), (0, 4), (10, -2), (10, -2)], ((0, 4), (10, -2), (-9, -3))),
        ([(i, i + 1) for i in range(40)], ((0, 40),)),
    ],
    ids=str,
)
def test_overlapping_ranges_are_merged(given: Any, merged: Any) -> None:
    assert check_ranges("must_skip", given) == merged
    assert check_ranges("must_skip", merged) == merged


bounds = st.integers(-90, 90)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(bounds, st.none() | bounds), max_size=6),
    st.lists(st.tuples(bounds, st.none() | bounds), max_size=6),
    st.integers(1, 80),
    st.integers(1, 40),
)
def test_what_the_graph_reads_is_what_slices_say(
    computed: list[Any], skipped: list[Any], length: int, tile: int
) -> None:
    """For any ranges that the options take, whatever they have in common: then keys are skipped."""
    found: list[Any] = []
    for pairs in (computed, skipped):
        valid = []
        for pair in pairs:
            try:
                valid += check_ranges("must_skip", [pair]) or ()
            except OptionValueError:
                assert not range(1000)[slice(*pair)] or pair[0] < 0 <= (pair[1] or 0)
        found.append(check_ranges("must_skip", valid))
    tokens = torch.zeros(2, length, dtype=torch.bool)
    for row, pairs in zip(tokens, found, strict=True):
        for start, end in pairs:
            row[start:end] = True
    table, k = range_table(KeyRanges(*found)), torch.empty(1, 1, length, 4)
    assert torch.equal(hide_keys(table, k)[0] == -math.inf, tokens[1])
    kinds = [2 if s.all() else int(c.any()) for c, s in zip(*(t.split(tile) for t in tokens), strict=True)]
    assert find_key_tiles(table, k, tile).tolist() == kinds
    bias = torch.randn(3, length)
    assert torch.equal(hide_keys(table, k, bias), bias.masked_fill(tokens[1], -math.inf))


def step(number: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Arguments of one denoising step of a `Denoiser`."""
    generator = torch.Generator().manual_seed(0)
    latents, prompt = (torch.randn(1, tokens, DIM, generator=generator) for _ in range(2))
    timestep = torch.tensor([1000.0 - 100 * number])
    return {"hidden_states": latents * (1 - number / 10), "timestep": timestep, "prompt": prompt}


def denoiser(attend: Callable[..., Tensor] | None = None) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(attend).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def run(model: nn.Module, dynamic: bool | None = None, **options: Any) -> Callable[..., Tensor]:
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf, **options}
    return torch.compile(model, backend="liteattention", fullgraph=True, dynamic=dynamic, options=options)


def masked(ranges: list[tuple[int, int | None]], padding: int = 0) -> Callable[..., Tensor]:
    """Dense attention that does not see the keys of these ranges, nor the last `padding` ones."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = torch.ones(k.shape[2], dtype=torch.bool)
        for start, end in ranges:
            shown[start:end] = False
        shown[k.shape[2] - padding :] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown.expand(q.shape[2], -1))

    return attend


SKIPPED: list[tuple[int, int | None]] = [(0, 150), (-70, -3), (200, 201)]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dense_steps", [(0, 0), (2, 0)], ids=str)
def test_keys_that_must_be_skipped_are_hidden_as_by_a_mask(inner: str, dynamic: bool, dense_steps: Any) -> None:
    """Exactly, also where a range ends inside of a tile; what lies in one as a whole is not computed at any step."""
    sparse = run(model := denoiser(), dynamic, must_skip=SKIPPED, inner=inner, dense_steps=dense_steps)
    dense = denoiser(masked(SKIPPED))
    for number in range(3):
        torch.testing.assert_close(sparse(**step(number)), dense(**step(number)))
    (state,) = layer_states(model)
    assert set(state.state[0, ..., COMPUTED_WORD].flatten().tolist()) == {tile_count(TOKENS, TILE.k) - 150 // TILE.k}
    if dynamic:
        torch.testing.assert_close(sparse(**step(3, 500)), dense(**step(3, 500)))
        assert len(lite_compile.report().graphs) == 1


def test_a_mask_that_the_model_has_is_kept() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown = torch.arange(k.shape[2]) < k.shape[2] - 20
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown[None, None, None])

    sparse = run(denoiser(padded), must_skip=SKIPPED[:1])
    for number in range(3):
        expected = denoiser(masked(SKIPPED[:1], padding=20))(**step(number))
        torch.testing.assert_close(sparse(**step(number)), expected)
    assert lite_compile.report().rewritten


@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_that_must_be_computed_are_though_everything_is_marked(dynamic: bool) -> None:
    sparse = run(model := denoiser(), dynamic, must_compute=[(100, 110), (-3, None)])
    sparse(**step(0))
    mark_everything(model)
    hidden = torch.ones(TOKENS, dtype=torch.bool)
    for start, end in ((100, 110), (TOKENS - 3, TOKENS)):
        hidden[start // TILE.k * TILE.k : -(-end // TILE.k) * TILE.k] = False
    assert hidden.any()
    places = hidden.nonzero().flatten().tolist()
    expected = denoiser(masked([(i, i + 1) for i in places]))(**step(1))
    torch.testing.assert_close(sparse(**step(1)), expected)


def test_queries_of_ranges_are_not_protected() -> None:
    sparse = run(model := denoiser(), must_compute=[(0, 1)])
    sparse(**step(0))
    mark_everything(model)
    sparse(**step(1))
    (state,) = layer_states(model)
    assert (state.state[0, ..., COMPUTED_WORD] == 1).all()


def test_nothing_is_added_unless_it_is_asked_for() -> None:
    texts = {}
    for name, options in (("none", {}), ("empty", {"must_skip": []}), ("some", {"must_skip": [(3, 9)]})):
        gm, state, _ = rewrite_graph(capture(Denoiser(), *inputs()), Options(min_seq_len=64, **options))
        assert state is not None
        texts[name] = gm.code
    assert texts["empty"] == texts["some"]
    assert "lite_ranges" in texts["some"]
    assert not any(name in texts["none"] for name in ("lite_ranges", "key_tiles", "key_bias"))
    gm, *_ = rewrite_graph(capture(Denoiser(), *inputs()), Options(min_seq_len=64, must_compute=[(3, 9)]))
    assert "key_tiles" in gm.code
    assert "key_bias" not in gm.code  # only must_skip needs one


def test_sites_of_one_length_share_what_they_are_told() -> None:
    gm, *_ = rewrite_graph(capture(Denoiser(cross=False), *inputs()), Options(min_seq_len=64, must_skip=[(3, 9)]))
    assert gm.code.count("hide_keys(") == gm.code.count("find_key_tiles(") == 1

    class Twice(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.other = Attention()

        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return self.other(super().forward(hidden_states, timestep, prompt))

    gm, *_ = rewrite_graph(capture(Twice(), *inputs()), Options(min_seq_len=64, must_skip=[(3, 9)]))
    assert gm.code.count("lite_compile.attend") == 2
    assert gm.code.count("hide_keys(") == gm.code.count("find_key_tiles(") == 1


RANGES: list[dict[str, Any]] = [
    {"must_skip": [(0, 300)]},
    {"must_compute": [(0, None)], "must_skip": []},
    {"must_compute": [(100, 200)], "must_skip": [(-128, None), (300, 310)]},
]


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_other_ranges_recompile_nothing_and_equal_a_fresh_compilation(compile_model: Any, inner: str) -> None:
    model = tiny_wan()
    run = compile_model(model, threshold=-3.0, inner=inner, must_compute=[], must_skip=[])
    denoise(run, noise(0), PROMPTS, 5)
    assert lite_compile.stats(model).density < 1
    graphs = counters["stats"]["unique_graphs"]
    held: dict[str, Any] = {"must_compute": [], "must_skip": []}
    for ranges in RANGES:
        lite_compile.set_ranges(model, **ranges)
        held |= ranges
        result = denoise(run, noise(1), PROMPTS, 5), masks(model)
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["recompiles"]
        fresh = tiny_wan()
        other = compile_model(fresh, threshold=-3.0, inner=inner, **held)
        assert_same((denoise(other, noise(1), PROMPTS, 5), masks(fresh)), result)
        graphs = counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_in_the_middle_of_a_generation_a_new_one_starts(compile_model: Any) -> None:
    model = tiny_wan()
    run = compile_model(model, threshold=-1.0, must_skip=[(0, 512)])
    latents = denoise(run, noise(0), PROMPTS, 6, stop_after=4)
    lite_compile.set_ranges(model, must_skip=[])
    call = {"timestep": torch.tensor([300.0], device=DEVICE), "encoder_hidden_states": PROMPTS[0], "return_dict": False}
    with torch.no_grad():
        ours, expected = (f(hidden_states=latents, **call)[0] for f in (run, compile_model(tiny_wan(), must_skip=[])))
    assert torch.equal(ours, expected)  # no tile that was hidden is skipped
    assert {(s.generations, s.steps, s.density) for s in lite_compile.stats(model).streams} == {(2, 1, 1.0)}


def test_ranges_and_thresholds_are_set_independently() -> None:
    model, fresh = tiny_wan(), tiny_wan()
    run = compiled(model, threshold=-20.0, must_skip=[])
    denoise(run, noise(0), PROMPTS, 3)
    lite_compile.set_ranges(model, must_skip=[(0, 100)])
    lite_compile.set_threshold(model, -2.0)
    expected = denoise(compiled(fresh, threshold=-2.0, must_skip=[(0, 100)]), noise(1), PROMPTS, 5), masks(fresh)
    assert_same((denoise(run, noise(1), PROMPTS, 5), masks(model)), expected)
    lite_compile.set_ranges(model, must_skip=[])
    other = tiny_wan()
    expected = denoise(compiled(other, threshold=-2.0), noise(1), PROMPTS, 5), masks(other)
    assert_same((denoise(run, noise(1), PROMPTS, 5), masks(model)), expected)


def test_models_that_share_a_graph_keep_their_own() -> None:
    one, other = tiny_wan(0), tiny_wan(1)
    runs = {model: compiled(model, must_skip=[]) for model in (one, other)}
    for call in runs.values():
        denoise(call, noise(0), PROMPTS, 3)
    before = denoise(runs[other], noise(1), PROMPTS, 3)
    lite_compile.set_ranges(one, must_skip=[(0, 512)])
    assert torch.equal(denoise(runs[other], noise(1), PROMPTS, 3), before)
    assert counters["stats"]["unique_graphs"] == 1


def test_excluded_layers_see_all_keys_and_dense_ones_do_not() -> None:
    """A block that is excluded runs the graph of the others, and is not told of any ranges."""
    results = {}
    for name, options in (("excluded", {"exclude_layers": ["*"]}), ("dense", {"dense_layers": ["*"]})):
        for compile_model in (compile_blocks, compile_whole):
            ours = compile_model(tiny_wan(), must_skip=[(0, 900)], **options)
            results[name, compile_model] = denoise(ours, noise(0), PROMPTS, 2)
    plain = denoise(tiny_wan(), noise(0), PROMPTS, 2)
    hidden = denoise(compile_whole(tiny_wan(), threshold=-math.inf, must_skip=[(0, 900)]), noise(0), PROMPTS, 2)
    assert (plain - hidden).norm() > 0.01 * plain.norm()
    for (name, _), result in results.items():
        assert distance(result, {"excluded": plain, "dense": hidden}[name]) < TOLERANCE


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
@pytest.mark.parametrize(
    ("ranges", "named"),
    [
        ({"must_compute": [(0, 600)], "must_skip": [(-500, None)]}, r"overlap in layer .*attn1'.* 1024 keys"),
        ({"must_skip": [(0, 1024)]}, r"leaves no key in layer .*attn1'.* 1024 keys"),
    ],
    ids=["overlap", "no key"],
)
def test_ranges_that_do_not_fit_the_layers_raise_at_first_use_or_when_they_are_set(
    ranges: dict[str, Any], named: str, compile_model: Any
) -> None:
    with pytest.raises(OptionValueError, match=named):
        denoise(compile_model(tiny_wan(), **ranges), noise(0), PROMPTS, 1)
    torch._dynamo.reset()
    model = tiny_wan()
    run = compile_model(model, must_compute=[], must_skip=[])
    before = denoise(run, noise(0), PROMPTS, 3)
    with pytest.raises(OptionValueError, match=named):
        lite_compile.set_ranges(model, **ranges)
    assert torch.equal(denoise(run, noise(0), PROMPTS, 3), before)  # nothing has changed


def test_a_model_that_was_compiled_without_the_option_says_so() -> None:
    model = tiny_wan()
    run = compiled(model, must_compute=[])
    denoise(run, noise(0), PROMPTS, 2)
    with pytest.raises(
        OptionValueError, match=r"must_skip.*compiled without the option.*options=\{'must_skip': \[\]\}"
    ):
        lite_compile.set_ranges(model, must_skip=[(0, 5)])
    lite_compile.set_ranges(model, must_skip=[], must_compute=[(0, 5)])
    denoise(run, noise(0), PROMPTS, 2)
    late = tiny_wan()
    lite_compile.set_ranges(late, must_compute=[(0, 5)])  # not compiled yet: its first call tells
    with pytest.raises(OptionValueError, match=r"must_compute.*compiled without"):
        denoise(compiled(late, must_skip=[]), noise(0), PROMPTS, 1)


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_a_model_that_is_compiled_again_with_other_ranges_follows_them(compile_model: Any) -> None:
    """The text of the graph does not show them."""
    model = tiny_wan()
    for ranges in ([(0, 512)], [(0, 100)]):
        torch._dynamo.reset()
        ours = denoise(compile_model(model, must_skip=ranges), noise(0), PROMPTS, 3)
        assert torch.equal(ours, denoise(compile_model(tiny_wan(), must_skip=ranges), noise(0), PROMPTS, 3))


def test_what_was_compiled_before_does_not_matter() -> None:
    model = tiny_wan()
    denoise(compiled(model), noise(0), PROMPTS, 2)
    torch._dynamo.reset()
    run = compiled(model, must_skip=[])
    before = denoise(run, noise(0), PROMPTS, 2)
    lite_compile.set_ranges(model, must_skip=[(0, 512)])
    assert not torch.equal(denoise(run, noise(0), PROMPTS, 2), before)


@pytest.mark.parametrize(
    ("ranges", "error"),
    [({"must_skip": (0, 5)}, OptionTypeError), ({"must_skip": [(5, 5)]}, OptionValueError),
     ({"must_skip": [(0, 5)], "must_compute": [(4, 6)]}, OptionValueError)],
)  # fmt: skip
def test_wrong_ranges_change_nothing(ranges: dict[str, Any], error: type[Exception]) -> None:
    model = tiny_wan()
    run = compiled(model, must_skip=[], must_compute=[])
    before = denoise(run, noise(0), PROMPTS, 3)
    with pytest.raises(error, match="must_skip"):
        lite_compile.set_ranges(model, **ranges)
    assert torch.equal(denoise(run, noise(0), PROMPTS, 3), before)
    for wrong in (None, 3):
        with pytest.raises(TypeError, match="model is"):
            lite_compile.set_ranges(wrong, must_skip=[])  # type: ignore[arg-type]
