"""Counters of persistent kernels: zeros at first, one per state and stream, outside of the memory of CUDA graphs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from lite_compile.kernels import work_counters
from lite_compile.kernels.work_counters import WORDS, WorkCounters


def test_calls_that_may_run_at_once_do_not_share_a_counter() -> None:
    counters = WorkCounters(torch.device("cpu"))
    counter = counters.of(1000, 0)
    assert counter.dtype == torch.int32
    assert counter.tolist() == [0] * WORDS
    assert counters.of(1000, 0) is counter
    others = [counters.of(1000, 7), counters.of(2000, 0)]
    assert len({x.data_ptr() for x in (counter, *others)}) == 3


def test_threads_that_ask_at_once_get_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_counters, "IN_ONE_BUFFER", 3)
    counters = WorkCounters(torch.device("cpu"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: counters.of(i // 2, 0), range(200)))
    assert len({x.data_ptr() for x in found}) == 100


def test_counters_are_allocated_by_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor has what the thread that warms a CUDA graph up allocates in the memory of graphs."""
    allocating: list[int] = []
    allocate = work_counters._allocate

    def watch(device: torch.device) -> list[torch.Tensor]:
        allocating.append(threading.get_ident())
        return allocate(device)

    monkeypatch.setattr(work_counters, "_allocate", watch)
    with torch.inference_mode():
        counter = WorkCounters(torch.device("cpu")).of(1000, 0)
    assert allocating
    assert threading.get_ident() not in allocating
    assert not counter.is_inference()


def test_a_graph_that_finds_no_counter_zeroes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated while one is captured is written by replays alone, and no other call may use it."""
    counters = WorkCounters(torch.device("cuda"))
    made: list[torch.Tensor] = []

    def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(torch.full(shape, 0, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert counters.of(1000, 0) is made[0]
    assert counters.of(1000, 0) is made[1]
    counters._free.append(torch.full((WORDS,), 0, dtype=torch.int32))
    assert counters.of(1000, 0) is counters.of(1000, 0)
