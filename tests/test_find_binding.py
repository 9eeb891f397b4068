"""The short way to a binding finds what the search finds."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from lite_compile import find_binding
from lite_compile.find_binding import MAX_BINDINGS, BindingFinder

CPU = torch.device("cpu")


def model(first: Tensor | None = None) -> list[Tensor]:
    return [torch.zeros(2) if first is None else first, torch.zeros(3)]


def test_a_model_is_searched_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    finder, ours, other = BindingFinder("graph", 1, CPU), model(), model()
    bindings = [finder.find(ours), finder.find(other)]
    assert bindings[0] is not bindings[1]
    monkeypatch.setattr(find_binding, "find_binding", None)
    assert [finder.find(ours), finder.find(other)] == bindings
    assert bindings[0].calls == 2
    assert bindings[0].last_call < bindings[1].last_call


def test_graphs_of_one_text_share_their_bindings() -> None:
    ours = model()
    found = BindingFinder("graph", 1, CPU).find(ours)
    assert BindingFinder("graph", 1, CPU).find(ours) is found
    assert BindingFinder("another", 1, CPU).find(ours) is not found


def test_models_that_share_their_first_layer_are_told_apart() -> None:
    finder, ours = BindingFinder("graph", 1, CPU), model()
    other = model(ours[0])
    found = [finder.find(ours), finder.find(other)]
    assert found[0] is not found[1]
    assert [finder.find(ours), finder.find(other)] == found


def test_what_was_written_to_is_another_model() -> None:
    finder, ours = BindingFinder("graph", 1, CPU), model()
    found = finder.find(ours)
    finder.find(ours)
    ours[1].add_(1)
    rewritten = finder.find(ours)
    assert rewritten is not found
    assert rewritten.rewrites == 1
    assert finder.find(ours) is rewritten
    assert rewritten.rewrites == 0


def test_a_tensor_at_the_id_of_one_that_is_gone_is_another_model() -> None:
    finder, ours = BindingFinder("graph", 1, CPU), model()
    for _ in range(20):
        found = finder.find(ours)
        ours[1] = torch.zeros(3)
        assert finder.find(ours) is not found


def test_bindings_go_with_their_model() -> None:
    finder, ours = BindingFinder("graph", 1, CPU), model()
    gone = weakref.ref(finder.find(ours))
    del ours
    gc.collect()
    assert gone() is None


def test_the_least_recently_used_is_dropped_though_no_search_saw_its_use() -> None:
    first = torch.zeros(2)
    models = [model(first) for _ in range(MAX_BINDINGS + 1)]
    finder, others = BindingFinder("graph", 1, CPU), BindingFinder("graph", 1, CPU)
    kept = weakref.ref(finder.find(models[0]))
    dropped = weakref.ref(others.find(models[1]))
    for each in models[2:MAX_BINDINGS]:
        others.find(each)
    finder.find(models[0])  # without a search: this graph knows no other model
    others.find(models[MAX_BINDINGS])
    gc.collect()
    assert kept() is not None
    assert dropped() is None
