"""Whose call the running code is part of, when roots call each other, calls break off, and threads share a root."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lite_compile.root_clock import Root, current_call, root_of


class Denoiser(nn.Module):
    """A root that runs `work`."""

    def __init__(self, work: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.work = work

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> None:
        current_call()  # as a compiled block does, which installs the hooks
        self.work()


def run(model: nn.Module) -> None:
    model(torch.zeros(1, 2, 3), torch.ones(1))


def here() -> Root | None:
    call = current_call()
    return None if call is None else call.root


def test_the_innermost_root_keeps_the_clock_and_gives_it_back() -> None:
    found: list[Root | None] = []
    inner = Denoiser(lambda: found.append(here()))
    run(inner)

    def work() -> None:
        found.append(here())
        run(inner)
        found.append(here())
        run(inner)
        found.append(here())

    outer = Denoiser(work)
    for _ in range(2):
        found.clear()
        run(outer)
        one, other = root_of(outer), root_of(inner)
        assert one is not None
        assert other is not None
        assert found == [one, other, one, other, one]
        assert here() is None


def test_a_call_that_was_broken_off_is_nobodys() -> None:
    """An interrupt is no `Exception`, for which alone torch calls hooks that are always called."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    inner = Denoiser()
    run(inner)
    inner.work = interrupt
    found: list[Root | None] = []

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            run(inner)
        found.append(here())

    outer = Denoiser(work)
    run(outer)
    root = root_of(inner)
    assert root is not None
    assert root.call is not None  # or this tests nothing
    assert found == [root_of(outer)]
    with pytest.raises(KeyboardInterrupt):
        run(inner)
    assert here() is None


def test_a_root_that_calls_itself_has_no_clock_afterwards() -> None:
    found: list[Root | None] = []

    def work() -> None:
        found.append(here())
        if len(found) == 1:
            run(model)
            found.append(here())

    model = Denoiser(work)
    run(model)
    assert found == [root_of(model), root_of(model), None]
    model.work = lambda: found.append(here())
    run(model)
    assert found[-1] is root_of(model)


def test_threads_follow_their_own_calls() -> None:
    found: dict[str, Root | None] = {}
    entered, finish = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert finish.wait(60)
        found["first"] = here()

    def look() -> None:
        found["second"] = here()

    shared, own = Denoiser(), Denoiser(lambda: found.update(own=here()))
    run(shared)
    shared.work = wait
    thread = threading.Thread(target=run, args=(shared,))
    thread.start()
    assert entered.wait(60)
    shared.work = look
    run(shared)  # while the other thread is in the middle of a call
    run(own)
    found["outside"] = here()
    finish.set()
    thread.join()
    assert found == {"first": root_of(shared), "second": None, "own": root_of(own), "outside": None}
    run(shared)
    assert found["second"] is root_of(shared)


def test_calls_that_end_in_another_thread_do_not_hide_the_innermost_root() -> None:
    other_began, inner_began, other_ended = (threading.Event() for _ in range(3))
    outer, inner, other = Denoiser(), Denoiser(), Denoiser()
    for model in (outer, inner, other):
        run(model)
    found: list[Root | None] = []

    def work_of_other() -> None:
        other_began.set()
        assert inner_began.wait(60)

    def run_other() -> None:
        run(other)
        other_ended.set()

    def work_of_inner() -> None:
        inner_began.set()
        assert other_ended.wait(60)
        found.append(here())

    def work_of_outer() -> None:
        thread = threading.Thread(target=run_other)
        thread.start()
        assert other_began.wait(60)
        run(inner)
        found.append(here())
        thread.join()

    outer.work, inner.work, other.work = work_of_outer, work_of_inner, work_of_other
    run(outer)
    assert found == [root_of(inner), root_of(outer)]
