"""What surrounds a kernel's launch: variants, scratch, and the short way to what Triton compiled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler.compiler import CompiledKernel  # noqa: E402

from lite_compile.kernels import launch  # noqa: E402
from lite_compile.kernels.launch import Launch, Launcher, address_of, kinds  # noqa: E402
from lite_compile.kernels.scratch import ALIGNMENT, Scratch  # noqa: E402

STREAM, HANDLE, METADATA = 77, 5, (4, 1, 0)
GRID = (3, 2, 1)


class Function:
    """Stands for a `triton.jit` function whose kernels, Triton's own class, are launched by `run`."""

    def __init__(self, run: Any) -> None:
        self.run, self.calls = run, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((grid, arguments, keywords))
            kernel = CompiledKernel.__new__(CompiledKernel)
            kernel.module = kernel.src = None
            kernel.function, kernel.packed_metadata, kernel.name, kernel._run = HANDLE, METADATA, "stub", self.run
            kernel._init_handles = lambda: None
            return kernel

        return compile_and_launch


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a GPU."""
    stub = SimpleNamespace(get_current_stream=lambda device: STREAM, get_current_device=lambda: 0)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=stub))
    monkeypatch.setattr("triton.compiler.compiler.driver", SimpleNamespace(active=stub))


def prepared(run: Any) -> tuple[Launch, Function]:
    function = Function(run)
    return Launcher(function).variant(0, "name", {"TILE": 64}, num_warps=2), function


@pytest.mark.usefixtures("active")
def test_a_compiled_kernel_is_launched_as_triton_does() -> None:
    """But without hooks, of which nobody registered any."""
    launched: list[Any] = []
    variant, function = prepared(lambda *arguments: launched.append(arguments))
    x = torch.zeros(4)
    assert not variant.ready
    variant(GRID, (x, 8))
    assert function.calls == [(GRID, (x, 8), {"TILE": 64, "num_warps": 2})]
    assert variant.ready

    variant(GRID, (address_of(x), 8))
    variant._compiled[GRID](x.data_ptr(), 8, 64)
    ours, theirs = launched
    assert ours[:6] == theirs[:6] == (*GRID, STREAM, HANDLE, METADATA)
    assert ours[6:9] == (None, None, None)
    assert ours[9:] == theirs[9:] == (x.data_ptr(), 8, 64)
    assert len(function.calls) == 1


@pytest.mark.usefixtures("active")
def test_a_profiler_sees_launches() -> None:
    launched: list[Any] = []
    variant, _ = prepared(lambda *arguments: launched.append(arguments))
    variant(GRID, (1,))
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        variant(GRID, (1,))
    finally:
        hooks.remove(print)
    assert launched[0][7] is hooks
    variant(GRID, (1,))
    assert launched[1][7] is None


@pytest.mark.usefixtures("active")
def test_another_triton_is_left_to_launch_itself() -> None:
    launched: list[Any] = []

    def run(*arguments: Any) -> None:
        if arguments[7] is None:
            raise TypeError("takes no such arguments")
        launched.append(arguments)

    variant, _ = prepared(run)
    variant(GRID, (1,))
    variant(GRID, (1,))
    variant(GRID, (1,))
    assert [arguments[9:] for arguments in launched] == [(1, 64)] * 2


def test_the_interpreter_gets_tensors() -> None:
    """It compiles nothing."""

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: None

    variant = Launcher(Interpreted()).variant(-1, "name", {})
    variant(GRID, ())
    variant(GRID, ())
    assert not variant.ready


def test_variants_differ_in_device_name_and_constants() -> None:
    launcher = Launcher(None)
    first = launcher.variant(0, "a", {"TILE": 64})
    assert launcher.variant(0, "a", {"TILE": 64}) is first
    others = ((1, "a", {"TILE": 64}), (0, "b", {"TILE": 64}), (0, "a", {"TILE": 32}))
    assert all(launcher.variant(*other) is not first for other in others)


def test_kinds_are_what_triton_specialises_on() -> None:
    assert len({kinds([x]) for x in (1, 2, 16, 2**31, 2**31 + 1)}) == 5
    assert kinds([2, 32]) == kinds([3, 48])


def test_scratch_is_one_buffer_of_tensors_that_do_not_overlap() -> None:
    shapes = (
        ((3, 5), torch.int16),
        ((7,), torch.int64),
        ((0,), torch.int64),
        ((2, 9), torch.int8),
        ((4,), torch.int32),
    )
    scratch = Scratch.of(*shapes)
    buffer = scratch.allocate(torch.device("cpu"))
    tensors = scratch.tensors(buffer)
    assert [(tuple(x.shape), x.dtype) for x in tensors] == list(shapes)
    for number, x in enumerate(tensors):
        x.fill_(number)
    assert all(bool((x == number).all()) for number, x in enumerate(tensors))
    assert [address - buffer.data_ptr() for address in scratch.addresses(buffer)] == [p.start for p in scratch.parts]
    assert all(part.start % ALIGNMENT == 0 for part in scratch.parts)
    in_use = [(x, address) for x, address in zip(tensors, scratch.addresses(buffer), strict=True) if x.numel()]
    assert all(x.data_ptr() == address for x, address in in_use)


def test_a_plan_of_variants_compiled_for_other_plans_is_not_ready_until_all_are() -> None:
    """A kernel that is not compiled yet has to be given tensors: of an address Triton would make an integer."""
    from lite_compile.kernels.attend_hopper import _plan

    def plan(keys: int, has_kinds: bool) -> Any:
        shapes = torch.Size((1, 1, 8, 64)), torch.Size((1, 1, keys, 64))
        return _plan(*shapes, torch.bfloat16, 99, 1, None, False, (), None, "max", has_kinds)

    long, short = 128 * 2**15 + 1, 128 * 65 + 1
    for compiled in (plan(long, False), plan(short, True)):
        for each in (compiled.attend, *compiled.lists):
            each.ready = True
        assert compiled.ready
    both = plan(long, True)
    assert both.attend.ready
    assert both.lists.record_visits.ready
    assert not both.ready
    both.lists.list_visits.ready = True
    assert both.ready


def test_short_rows_need_one_launch() -> None:
    from lite_compile.kernels.attend_hopper import _plan

    def plan(keys: int) -> Any:
        shapes = torch.Size((1, 1, 8, 64)), torch.Size((1, 1, keys, 64))
        return _plan(*shapes, torch.bfloat16, 98, 1, None, False, (), None, "max", False)

    one = plan(128 * 64)
    assert one.lists is None
    one.attend.ready = True
    assert one.ready
    assert plan(128 * 64 + 1).lists is not None


@pytest.mark.parametrize(
    ("dtype", "dim", "biased", "qk_dtype", "fixed"),
    [
        (torch.bfloat16, 128, False, None, True),
        (torch.bfloat16, 72, False, None, True),
        (torch.bfloat16, 128, False, "int8", True),
        (torch.bfloat16, 128, False, "fp8", True),
        (torch.bfloat16, 64, False, None, False),
        (torch.bfloat16, 128, True, None, False),
        (torch.float16, 128, False, None, False),
    ],
)
def test_which_long_rows_have_a_fixed_shift(
    dtype: torch.dtype, dim: int, biased: bool, qk_dtype: str | None, fixed: bool
) -> None:
    from lite_compile.kernels.attend_hopper import _plan
    from lite_compile.kernels.hopper_workers import attend_kernel

    shapes = torch.Size((1, 1, 8, dim)), torch.Size((1, 1, 128 * 65, dim))
    plan = _plan(*shapes, dtype, 97, 1, 1 if biased else None, False, (), qk_dtype, "max", False)
    names = attend_kernel.arg_names[-len(plan.attend._values) :]
    assert dict(zip(names, plan.attend._values, strict=True))["FIXED_SHIFT"] is fixed


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_short_rows_are_given_their_arguments_by_place(
    monkeypatch: pytest.MonkeyPatch, given: bool, ready: bool
) -> None:
    from lite_compile.kernels import attend_hopper as module
    from lite_compile.kernels.hopper_pipeline import HOPPER_TILE
    from lite_compile.kernels.hopper_short_rows import attend_short_kernel
    from lite_compile.ops import LOG2_E, NOW_WORDS
    from lite_compile.skip_state import state_shape

    launched: list[tuple[Any, ...]] = []
    stub = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=stub))
    monkeypatch.setattr(module, "multiprocessors", lambda device: 5)
    monkeypatch.setattr(Launch, "__call__", lambda self, grid, arguments: launched.append((self, grid, arguments)))
    batch, heads, kv_heads, q_len, k_len, dim = 2, 4, 2, 400, 700, 64
    q, out = torch.zeros(2, batch, heads, q_len, dim, dtype=torch.bfloat16)
    k, v = torch.zeros(2, batch, kv_heads, k_len, dim, dtype=torch.bfloat16)
    state = torch.zeros(state_shape(3, batch, heads, q_len, k_len, HOPPER_TILE), dtype=torch.int32)
    now, threshold = torch.zeros(NOW_WORDS, dtype=torch.int32), torch.tensor(-3.0)
    lse, key_bias = torch.zeros(batch, heads, q_len), torch.zeros(batch, k_len)
    key_tiles = torch.zeros(6, dtype=torch.int8)
    optional = (lse, key_bias, (1, 2, 3, 4)) if given else (None, None, ())
    plan = module._plan(
        q.shape, k.shape, q.dtype, -1, 3, batch if given else None, given, optional[2], None, "mass", given
    )
    monkeypatch.setattr(plan.attend, "ready", ready)
    module.attend_hopper(
        q, k, v, state, now, 0.5, threshold, HOPPER_TILE, out, *optional, criterion="mass",
        key_tiles=key_tiles if given else None,
    )  # fmt: skip

    variant, grid, arguments = launched[-1]
    assert variant is plan.attend
    assert len(launched) == 1 + given
    assert grid == (5, 1, 1)
    found = dict(zip(attend_short_kernel.arg_names, (*arguments, *variant._values), strict=True))
    blocks = {"q_desc": q, "k_desc": k, "v_desc": v, "o_desc": out}
    assert all(found[name].base.data_ptr() == x.data_ptr() for name, x in blocks.items())
    pointers = {"state": state, "now": now, "threshold": threshold}
    if given:
        pointers |= {"lse": lse, "key_bias": key_bias, "key_tiles": key_tiles}
    else:
        assert all(found[name] is None for name in ("lse", "key_bias", "biased", "key_tiles"))
    as_tensors = ("key_bias",)
    for name, x in pointers.items():
        assert found[name] is x if not ready or name in as_tensors else found[name] == x.data_ptr()
    assert found["q_scales"] is found["k_scales"] is None
    counter = module._counters(q.device).of(state.data_ptr(), STREAM)
    assert found["counter"] == counter.data_ptr() if ready else found["counter"] is counter
    scratch = [found[name] for name in ("order", "notes")]
    assert all(isinstance(x, int) for x in scratch) if ready else [x.shape for x in scratch] == [(24, 6), (24, 13)]
    numbers = {
        "programs": 24, "heads": heads, "heads_per_kv": 2, "q_len": q_len, "k_len": k_len, "q_tiles": 3, "k_tiles": 6,
        "bias_stride": k_len if given else 0, "streams": 3, "qk_scale": 0.5 * LOG2_E,
        "HAS_LSE": given, "HAS_BIAS": given, "QK_BITS": 16, "BY_MASS": True, "HAS_KINDS": given, "HAS_RANGES": given,
    }  # fmt: skip
    ends = [f"{end}_{i}" for i in range(4) for end in ("start", "end")]
    numbers |= dict(zip(ends, [*optional[2], *[0] * (8 - len(optional[2]))], strict=True))
    assert {name: found[name] for name in numbers} == numbers
