"""The option `probe`: the softmax mass that each step drops on sampled queries, measured in the graph."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from graphs import Denoiser, capture, inputs
from models import OPTIONS, compiled, denoise, noise, prompt, tiny_wan
from test_regional import compile_blocks, compile_whole
from torch import Tensor
from torch._dynamo.utils import counters

import lite_compile
from lite_compile.backend import rewrite_graph
from lite_compile.density_history import HISTORY_STEPS, probe_shape, read_dropped, record_dropped
from lite_compile.dropped_mass import SAMPLED_ROWS, sampled_rows
from lite_compile.layer_state import layer_states
from lite_compile.ops import watchers
from lite_compile.options import Options
from lite_compile.skip_state import TileShape, pack_bits, row_layout, skipped_tiles, state_shape, tile_count

PROMPTS = [prompt(0), prompt(1)]
TILE = TileShape(32, 16)


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    counters.clear()


def exact_masses(
    q: Tensor, k: Tensor, skipped: Tensor, tile: TileShape, scale: float, bias: Tensor | None = None
) -> Tensor:
    """float64 `[B, H, Sq]`: the softmax mass of the skipped tiles, of all rows, the plain way."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().mT * scale + (0 if bias is None else bias.double()[:, None, None])
    spread = skipped.repeat_interleave(tile.q, 2)[:, :, : q.shape[2]].repeat_interleave(tile.k, 3)[..., : k.shape[2]]
    return (scores.softmax(-1) * spread).sum(-1)


def random_state(batch: int, heads: int, q_len: int, k_len: int, share: float) -> tuple[Tensor, Tensor]:
    """A state of two slots whose second skips that share of the tiles under epoch 5; and bool `[B, H, q, k]`: which."""
    state = torch.zeros(state_shape(2, batch, heads, q_len, k_len, TILE), dtype=torch.int32)
    layout = row_layout(tile_count(k_len, TILE.k))
    skipped = torch.rand(batch, heads, state.shape[3], tile_count(k_len, TILE.k)) < share
    state[1, ..., 0] = 5
    state[1, ..., layout.mask_start :] = pack_bits(skipped, layout.mask_words)
    return state, skipped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_len", "k_len"), [(500, 333), (7, 40), (16, 17)])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("bias_batch", [0, 1, 2])
def test_it_is_the_mass_of_the_skipped_tiles(
    dtype: torch.dtype, q_len: int, k_len: int, kv_heads: int, bias_batch: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, q_len, 16).to(dtype)
    k = torch.randn(2, kv_heads, k_len, 16).to(dtype)
    bias = torch.randn(bias_batch, k_len) if bias_batch else None
    if bias is not None:
        bias[-1, 5:9] = -math.inf
    state, skipped = random_state(2, 3, q_len, k_len, 0.4)
    masses = exact_masses(q, k, skipped, TILE, 0.3, bias)
    for step in (0, 1, 7):
        now = torch.tensor([5, step, 1, 0, 0], dtype=torch.int32)
        found, same = torch.ops.lite_compile.dropped_mass(q, k, state, now, 0.3, *TILE, bias)
        assert torch.equal(same, now)
        expected = masses.gather(2, sampled_rows(6, q_len, step).view(2, 3, -1))
        torch.testing.assert_close(found.double(), torch.stack([expected.mean(), expected.amax()]), rtol=1e-5, atol=0)
    for epoch, slot in ((5, -1), (5, 0), (4, 1), (5, 2)):
        now = torch.tensor([epoch, 0, slot, 0, 0], dtype=torch.int32)
        assert torch.ops.lite_compile.dropped_mass(q, k, state, now, 0.3, *TILE, bias)[0].tolist() == [0, 0]


@pytest.mark.parametrize("q_len", [1, 15, 16, 100, 1024, 32760])
def test_sampled_rows_are_spread_and_change_with_head_and_step(q_len: int) -> None:
    seen = set()
    for step in range(50):
        rows = sampled_rows(24, q_len, step)
        assert rows.shape == (24, SAMPLED_ROWS)
        assert 0 <= int(rows.min()) <= int(rows.max()) < q_len
        assert bool((rows.diff(dim=1) >= 0).all())
        if q_len >= SAMPLED_ROWS:
            part = rows * SAMPLED_ROWS // q_len
            assert int((part - torch.arange(SAMPLED_ROWS)).abs().max()) <= 1
        seen.update(rows.flatten().tolist())
    assert len(seen) >= min(q_len, 1000)


def test_opcheck() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 100, 16), torch.randn(1, 1, 90, 16)
    state, _ = random_state(1, 2, 100, 90, 0.4)
    now = torch.tensor([5, 0, 1, 0, 0], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.lite_compile.dropped_mass.default,
        (q, k, state, now, 0.3, *TILE, torch.randn(1, 90)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )


def test_what_is_written_and_what_is_read() -> None:
    history = torch.zeros(probe_shape(2), dtype=torch.float64)

    def record(epoch: int, step: int, slot: int, mean: float) -> None:
        now = torch.tensor([epoch, step, slot, 1, 0], dtype=torch.int32)
        record_dropped([history], [torch.tensor([mean, 2 * mean])], now)

    record(9, 0, 1, 0.0)
    record(9, 2, 1, 0.25)
    record(9, 3, -1, 0.5)
    record(9, HISTORY_STEPS, 1, 0.5)
    assert read_dropped(history[1], 9, 4) == ((0.0, 0.0), None, (0.25, 0.5), None)
    assert read_dropped(history[1], 10, 3) == (None,) * 3
    assert read_dropped(history[0], 9, 2) == (None,) * 2


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_stats_of_a_model_are_what_its_calls_dropped(compile_model: Any, inner: str) -> None:
    """Two streams, two generations, no recompilation: each number is that of the plain computation."""
    model = tiny_wan()
    run = compile_model(model, threshold=-1.0, probe=True, inner=inner)
    expected: dict[tuple[int, int], dict[int, tuple[float, float]]] = {}

    def watch(q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile: TileShape, _: Any) -> None:
        epoch, step, slot = now.tolist()[:3]
        skipped = skipped_tiles(state[slot], epoch, tile_count(k.shape[2], tile.k))
        rows = sampled_rows(q.shape[0] * q.shape[1], q.shape[2], step).view(*q.shape[:2], -1)
        masses = exact_masses(q, k, skipped, tile, scale).gather(2, rows)
        expected.setdefault((state.data_ptr(), slot), {})[step] = (float(masses.mean()), float(masses.amax()))

    watchers.append(watch)
    try:
        for seed in (0, 1):
            expected.clear()
            denoise(run, noise(seed), PROMPTS, 5)
            owners = {state.layer: state.state.data_ptr() for state in layer_states(model)}
            for s in lite_compile.stats(model).streams:
                values = expected[owners[s.layer], s.stream]
                assert len(s.dropped_mass) == len(values) == 5
                assert s.dropped_mass[0] == (0.0, 0.0)
                for step, entry in enumerate(s.dropped_mass):
                    assert entry == pytest.approx(values[step], rel=1e-3, abs=1e-9)
    finally:
        watchers.remove(watch)
    assert {s.stream for s in lite_compile.stats(model).streams} == {0, 1}
    assert all(s.dropped_mass[-1] > (1e-6, 1e-6) for s in lite_compile.stats(model).streams)  # type: ignore[operator]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    assert not counters["graph_break"]


def test_nothing_skipped_drops_exactly_nothing_and_refreshed_steps_neither() -> None:
    model = tiny_wan()
    run = compiled(model, threshold=-1.0, probe=True, refresh_every=3, dense_steps=(1, 0), must_skip=[(0, 100)])
    denoise(run, noise(0), PROMPTS, 5)
    for s in lite_compile.stats(model).streams:
        assert [None if entry is None else entry[1] > 0 for entry in s.dropped_mass] == [None, False, True, False, True]
    (mean, most) = lite_compile.stats(model).dropped_mass(0)[-1] or (0.0, 0.0)
    values = [s.dropped_mass[-1] or (0.0, 0.0) for s in lite_compile.stats(model).streams if s.stream == 0]
    assert mean == pytest.approx(sum(v[0] for v in values) / len(values))
    assert most == max(v[1] for v in values)
    lite_compile.set_threshold(model, -math.inf)
    denoise(run, noise(1), PROMPTS, 4)
    assert all(entry in (None, (0.0, 0.0)) for s in lite_compile.stats(model).streams for entry in s.dropped_mass)


def test_off_by_default_and_then_the_graph_has_nothing_of_it() -> None:
    texts = {}
    for probe in (False, True):
        options = Options(min_seq_len=64, probe=probe)
        gm, state, _ = rewrite_graph(capture(Denoiser(), *inputs()), options)
        assert state is not None
        gm.graph.eliminate_dead_code()
        gm.recompile()
        texts[probe] = gm.code
    assert "probe" not in texts[False]
    assert "dropped" not in texts[False]
    assert texts[True].index("dropped_mass.default") < texts[True].index("attend.default")
    assert "record_dropped" in texts[True]
    model = tiny_wan()
    denoise(compiled(model), noise(0), PROMPTS[:1], 2)
    assert all(s.dropped_mass == () for s in lite_compile.stats(model).streams)
    assert all(state.probe is None for state in layer_states(model))


def test_results_are_the_same_with_and_without() -> None:
    results = [
        denoise(compiled(tiny_wan(), threshold=-1.0, probe=probe, history=True), noise(0), PROMPTS, 5)
        for probe in (False, True)
    ]
    assert torch.equal(*results)


def test_under_inductor_no_state_is_copied() -> None:
    from torch._inductor.utils import run_and_get_code

    options = {**OPTIONS, "inner": "inductor", "probe": True}
    model = tiny_wan()
    run = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
    arguments = {"hidden_states": noise(0), "encoder_hidden_states": prompt(0), "timestep": torch.tensor([1000.0])}
    with torch.no_grad():
        _, codes = run_and_get_code(run, **arguments)
    code = "\n".join(codes)
    assert code.count("lite_compile.dropped_mass.default(") == 2
    words = layer_states(model)[0].state.numel()
    assert not re.search(rf"empty_strided_cpu\(\(({words}|4, 1, 2), ", code)  # no other state
    assert ".item()" not in code
    assert code.index("dropped_mass.default(") < code.index("attend.default(")
