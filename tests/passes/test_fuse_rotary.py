"""RMS norm and rotary embedding become one op that computes what they did."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_passes import CPU, noise, tiny_flux, tiny_ltx, tiny_wan
from graphs import OPTIONS, capture
from rotary_models import (
    BATCH,
    DIM,
    EPS,
    HEADS,
    TOKENS,
    RotaryDenoiser,
    Rotate,
    Spelled,
    added,
    arguments,
    as_one_head,
    assert_same,
    over_heads,
    over_tokens,
    run_fused,
    tables,
    written,
)
from torch import Tensor, nn

from lite_compile import backend
from lite_compile.passes.fuse_rotary import fuse_rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPELLINGS = [written, added]
LAID_OUT = "clone(memory_format = torch.contiguous_format)"
"""Code that makes the copy of a table."""


def assert_fused(
    function: Callable[..., Any], *args: Any, times: int = 1, dynamic: bool | None = None, grad: bool = False
) -> None:
    with torch.set_grad_enabled(grad):
        expected = function(*args)
    outcome = run_fused(function, *args, dynamic=dynamic, grad=grad)
    assert outcome.fused == times
    assert outcome.guards == 0
    assert_same(outcome.result, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate", SPELLINGS)
@pytest.mark.parametrize("spelled", [over_tokens, over_heads])
@pytest.mark.parametrize("table_batch", [1, BATCH])
def test_both_spellings(
    spelled: Callable[[Rotate], Spelled], rotate: Rotate, dtype: torch.dtype, table_batch: int
) -> None:
    args = arguments(dtype, table_batch=table_batch, per_head=spelled is over_heads)
    assert_fused(spelled(rotate), *args)


@pytest.mark.parametrize("rotate", SPELLINGS)
def test_sizes_that_are_symbols(rotate: Rotate) -> None:
    for spelled in (over_tokens, over_heads):
        for table_batch in (1, BATCH):
            args = arguments(torch.bfloat16, table_batch=table_batch, per_head=spelled is over_heads)
            for marked in (args[0], *args[2:]):
                torch._dynamo.mark_dynamic(marked, 1)
            assert_fused(spelled(rotate), *args)


def test_one_graph_serves_every_length() -> None:
    lengths: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        lengths.append(fuse_rotary(gm, CPU, least_elements=0))
        gm.recompile()
        return gm.forward

    torch._dynamo.reset()
    function = over_tokens(written)
    run = torch.compile(function, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in (6, 10, 40):
            args = arguments(tokens=tokens)
            for marked in (args[0], *args[2:]):
                torch._dynamo.mark_dynamic(marked, 1)
            assert_same(run(*args), function(*args))
    assert lengths == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_batch", [1, BATCH])
@pytest.mark.parametrize("rotate", SPELLINGS)
def test_all_heads_as_one(rotate: Rotate, table_batch: int, dtype: torch.dtype) -> None:
    width = HEADS * DIM
    args = (
        noise(0, BATCH, TOKENS, width, dtype=dtype),
        noise(1, width, dtype=dtype),
        *tables(table_batch, TOKENS, width),
    )
    assert_fused(as_one_head(rotate), *args)


@pytest.mark.parametrize("rotate", SPELLINGS)
@pytest.mark.parametrize("spelled", [over_tokens, over_heads, as_one_head])
def test_norms_without_a_weight(spelled: Callable[[Rotate], Spelled], rotate: Rotate) -> None:
    x, _, cos, sin = arguments(torch.bfloat16)
    if spelled is as_one_head:
        cos, sin = tables(1, TOKENS, HEADS * DIM)
    assert_fused(spelled(rotate), x, None, cos, sin)


@pytest.mark.parametrize("rotate", SPELLINGS)
def test_queries_and_keys_out_of_one_projection(rotate: Rotate) -> None:
    def spelled(qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.chunk(3, -1)
        q, k = (F.rms_norm(x, (HEADS * DIM,), weight, EPS) for x in (q, k))
        q, k = (x.unflatten(2, (HEADS, -1)) for x in (q, k))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    _, *others = arguments(torch.bfloat16)
    assert_fused(spelled, noise(0, BATCH, TOKENS, 3 * HEADS * DIM, dtype=torch.bfloat16), *others, times=2)


def test_parameters_that_require_gradients_which_are_switched_off() -> None:
    x, weight, cos, sin = arguments()
    assert_fused(over_tokens(written), x, nn.Parameter(weight), cos, sin)
    outcome = run_fused(over_tokens(written), x, nn.Parameter(weight), cos, sin, grad=True)
    assert outcome.fused == 0
    assert outcome.is_unchanged
    assert_fused(over_tokens(written), x, weight, cos, sin, grad=True)


def other_order(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = torch.unbind(y.reshape(*y.shape[:-1], -1, 2), dim=-1)
    cos, sin = cos[..., 1::2], sin[..., ::2]
    first, second = torch.sub(cos * even, torch.mul(sin, odd)), torch.add(odd * cos, sin * even)
    out = torch.empty_like(y)
    out[..., 1::2] = second
    out[..., ::2] = first
    return out


def by_sines(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation by other angles is one all the same."""
    return written(y, sin, cos)


def sum_turned_around(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = y.unflatten(-1, (-1, 2)).unbind(4)
    swapped = torch.stack((odd.neg(), even), -1).reshape(y.shape)
    return (sin * swapped + cos * y).type_as(y)


def written_to_later(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = written(y, cos, sin)
    out[..., 0::2] = 3.0
    out.mul_(2.0)
    return out


def written_to_and_read_later(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = added(y, cos, sin)
    kept = out * 2
    out[:, 1:].add_(1.0)
    return kept + out.transpose(1, 2).transpose(1, 2)


@pytest.mark.parametrize(
    "rotate", [other_order, by_sines, sum_turned_around, written_to_later, written_to_and_read_later]
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_variants(rotate: Rotate, dtype: torch.dtype) -> None:
    assert_fused(over_tokens(rotate), *arguments(dtype))


def test_norms_by_keyword_and_as_a_module() -> None:
    norm = nn.RMSNorm(HEADS * DIM, EPS)
    x, weight, cos, sin = arguments()
    assert_fused(lambda x, cos, sin: added(norm(x).view(*x.shape[:2], HEADS, DIM), cos, sin), x, cos, sin)
    assert_fused(
        lambda x, weight, cos, sin: added(
            torch.rms_norm(input=x, weight=weight, eps=EPS, normalized_shape=[HEADS * DIM]).unflatten(2, (HEADS, -1)),
            cos,
            sin,
        ),
        x, weight, cos, sin,
    )  # fmt: skip


def test_the_layout_of_the_graph_stays() -> None:
    """What follows sees the same shape, strides and memory of its own; nothing is left of the old nodes."""

    def spelled(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = as_one_head(added)(x, weight, cos, sin)
        return y.view(*y.shape[:2], HEADS, DIM).transpose(1, 2)

    x, weight, _, _ = arguments()
    assert_fused(spelled, x, weight, *tables(1, TOKENS, HEADS * DIM))


def computed(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Tables that the graph makes."""
    return angles.cos(), angles.sin()


def twice(rotate: Rotate, cos: Tensor, sin: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return over_tokens(rotate)(x, weight, cos, sin) + over_tokens(rotate)(2 * x, weight, cos, sin)


def assert_laid_out(function: Callable[..., Any], *args: Any, fused: int, copies: int) -> None:
    """That so many rotations were fused, that so many tables were laid out for them, and what comes out."""
    outcome = run_fused(function, *args)
    assert outcome.fused == fused
    assert outcome.guards == 0
    assert outcome.code.count(LAID_OUT) == copies
    assert_same(outcome.result, function(*args))


def test_tables_that_the_graph_computes_are_laid_out_once() -> None:
    def spelled(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        return twice(written, *computed(angles), x, weight)

    x, weight, angles, _ = arguments(torch.bfloat16)
    assert_laid_out(spelled, x, weight, angles, fused=2, copies=2)


def test_tables_that_lie_in_memory_are_read_where_they_are() -> None:
    def spelled(x: Tensor, weight: Tensor, cos: Tensor, angles: Tensor) -> Tensor:
        return twice(written, cos, angles.sin()[..., :DIM], x, weight) + twice(added, *computed(angles), x, weight)

    x, weight, cos, angles = arguments(torch.bfloat16)
    # The copy is of the sines of the first two: all others are inputs, or dense.
    assert_laid_out(spelled, x, weight, cos, angles, fused=4, copies=1)


def test_tables_that_are_written_to_are_not_shared() -> None:
    def spelled(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        cos, sin = computed(angles)
        first = over_tokens(written)(x, weight, cos, sin)
        cos[..., :1].mul_(2)
        return first + over_tokens(written)(x, weight, cos, sin)

    x, weight, angles, _ = arguments(torch.bfloat16)
    assert_laid_out(spelled, x, weight, angles, fused=2, copies=1)


def test_tables_are_laid_out_before_the_first_rotation_that_reads_them() -> None:
    """Which need not be that of the first norm."""

    def spelled(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        cos, sin = computed(angles)
        q, k = (F.rms_norm(y, (x.shape[-1],), weight, EPS).unflatten(2, (HEADS, -1)) for y in (x, 2 * x))
        k = added(k, cos[..., :DIM], sin[..., :DIM])
        return k + added(q, cos[..., :DIM], sin[..., :DIM])

    x, weight, cos, sin = arguments(torch.bfloat16)
    angles = torch.cat([cos, sin], -1)
    assert_laid_out(spelled, x, weight, angles, fused=2, copies=2)


def test_tables_that_are_written_to_under_vmap_are_not_shared() -> None:
    """Inside of a transform of torch.func tensors show no storage of their own."""

    def spelled(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        cos, sin = computed(angles)
        first = over_tokens(written)(x, weight, cos, sin)
        torch.vmap(lambda table: table.mul_(2))(cos)
        return first + over_tokens(written)(x, weight, cos, sin)

    x, weight, angles, _ = arguments(torch.bfloat16)
    assert_laid_out(spelled, x, weight, angles, fused=2, copies=1)


def test_tables_of_symbolic_length_are_laid_out_without_a_guard() -> None:
    """Whether a table that is cut to the tokens at hand has gaps depends on their number."""

    def spelled(x: Tensor, weight: Tensor, angles: Tensor) -> Tensor:
        cos, sin = (table[:, : x.shape[1]] for table in computed(angles))
        return over_tokens(added)(x, weight, cos, sin)

    x, weight, _, _ = arguments(torch.bfloat16)
    angles = noise(7, BATCH, TOKENS + 4, 1, DIM)
    for marked in (x, angles):
        torch._dynamo.mark_dynamic(marked, 1)
    assert_laid_out(spelled, x, weight, angles, fused=1, copies=2)


@pytest.mark.parametrize("least", [BATCH * TOKENS * HEADS * DIM, BATCH * TOKENS * HEADS * DIM + 1])
def test_small_ones_stay(least: int) -> None:
    gm = capture(over_tokens(written), *arguments())
    before = gm.code
    assert fuse_rotary(gm, torch.device("cuda", 0), least_elements=0) == 0  # on another device
    fused = fuse_rotary(gm, CPU, least_elements=least)
    gm.recompile()
    assert fused == (least == BATCH * TOKENS * HEADS * DIM)
    assert (gm.code == before) == (fused == 0)
    assert ("normalize_rotate" in gm.code) == (fused == 1)


def test_a_token_that_does_not_fit_into_registers_stays() -> None:
    width = (1 << 14) + 2
    args = noise(0, 1, 2, width), noise(1, width), *tables(1, 2, width)
    outcome = run_fused(as_one_head(added), *args)
    assert outcome.fused == 0
    assert outcome.is_unchanged
    assert_fused(as_one_head(added), *(x[..., :-2].contiguous() for x in args))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("make", [tiny_wan, tiny_ltx, functools.partial(tiny_flux, num_layers=0)])
def test_models_of_diffusers(make: Callable[[], tuple[nn.Module, dict[str, Any]]], dynamic: bool | None) -> None:
    """Two in each of two blocks, with parameters as `from_pretrained` leaves them, and the numbers to the bit."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, given = make()
    finally:
        torch.set_default_dtype(torch.float32)
    given = {
        name: x.bfloat16() if isinstance(x, Tensor) else torch.tensor(x) if isinstance(x, list) else x
        for name, x in given.items()
    }
    model.eval()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
    outcome = run_fused(model, **given, return_dict=False, dynamic=dynamic)
    assert outcome.fused == 4
    assert outcome.code.count(LAID_OUT) == (2 if make is tiny_wan else 0)  # for both blocks
    assert torch.equal(outcome.result[0], expected)


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)], ids=str)
@pytest.mark.parametrize("asked", [True, False])
def test_the_backend_asks_for_it_on_cuda_devices(
    device: torch.device, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision says which device it is; the rest is as on the CPU, and so is what is fused."""
    decide, told = backend.decide_attention, list[torch.device]()

    def decide_there(*args: Any) -> list[Any]:
        return [replace(decision, device=device) for decision in decide(*args)]  # type: ignore[arg-type]

    def fuse(gm: torch.fx.GraphModule, where: torch.device) -> int:
        told.append(where)
        return fuse_rotary(gm, CPU, least_elements=0)

    monkeypatch.setattr(backend, "decide_attention", decide_there)
    monkeypatch.setattr(backend, "fuse_rotary", fuse)
    gm = capture(RotaryDenoiser(), noise(0, 1, 64, 32), torch.tensor([500.0]), *tables(1, 64, 1, 16))
    graph, _, report = backend.rewrite_graph(gm, replace(OPTIONS, fuse_rotary=asked))
    assert [site.rewritten for site in report.sites] == [True]
    is_fused = asked and device.type == "cuda"
    assert told == [device] * is_fused
    assert graph.code.count("normalize_rotate.default") == 2 * is_fused
    assert graph.code.count("lite_compile.attend") == 1
    assert "normalize_rotate" not in gm.code


def test_on_the_cpu_the_model_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite_compile.passes.fuse_rotary.LEAST_ELEMENTS", 0)
    gm = capture(RotaryDenoiser(), noise(0, 1, 64, 32), torch.tensor([500.0]), *tables(1, 64, 1, 16))
    graph, _, _ = backend.rewrite_graph(gm, OPTIONS)
    assert "lite_compile.attend" in graph.code
    assert "normalize_rotate" not in graph.code
    assert fuse_rotary(graph, CPU) == 2  # which the backend could have done


@pytest.mark.parametrize("rotate", SPELLINGS)
def test_numbers_that_are_symbols(rotate: Rotate) -> None:
    """Under `dynamic=True` the module's epsilon is one, which becomes a constant again."""
    args = noise(0, 1, 64, 32), torch.tensor([500.0]), *tables(1, 64, 1, 16)
    for table in args[2:]:
        torch._dynamo.mark_static(table, 3)
    assert_fused(RotaryDenoiser(rotate=rotate), *args, times=2, dynamic=True)
