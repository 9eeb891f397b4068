"""What a root notices of its own contents between two calls."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lite_compile.module_contents import ModuleContents, module_tensors


class Model(nn.Module):
    """Submodules without and with parameters and buffers, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(2)])
        self.norm = nn.BatchNorm1d(4)
        self.again = self.blocks[0]
        self.register_buffer("nothing", None)


def _write(model: Model) -> None:
    with torch.no_grad():
        model.blocks[1][0].bias.add_(1)


CHANGES: dict[str, Callable[[Model], object]] = {
    "written": _write,
    "buffer written": lambda m: m.norm.running_mean.zero_(),
    "parameter replaced": lambda m: setattr(m.blocks[0][0], "weight", nn.Parameter(torch.zeros(4, 4))),
    "buffer replaced": lambda m: setattr(m.norm, "running_var", torch.ones(4)),
    "buffer that was None": lambda m: setattr(m, "nothing", torch.zeros(1)),
    "parameter gone": lambda m: setattr(m.blocks[0][0], "bias", None),
    "first buffer of a module": lambda m: m.blocks[0][1].register_buffer("prompt", torch.zeros(2)),
    "first submodule of a module": lambda m: m.blocks[0][0].add_module("lora", nn.Linear(4, 1)),
    "submodule replaced": lambda m: m.blocks[0].__setitem__(1, nn.GELU()),
    "submodule removed": lambda m: m.blocks.__delitem__(1),
    "parts exchanged": lambda m: m.blocks.__init__([m.blocks[1], m.blocks[0]]),  # type: ignore[misc]
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_noticed(change: Callable[[Model], object]) -> None:
    model = Model()
    contents = ModuleContents(model)
    assert contents.unchanged()
    change(model)
    assert not contents.unchanged()
    assert ModuleContents(model).unchanged()


def test_tensors_that_come_back_at_the_same_address_are_others() -> None:
    """Python gives the id of what is gone to what comes next."""
    model = Model()
    for _ in range(20):
        contents = ModuleContents(model)
        linear = model.blocks[0][0]
        linear._parameters.pop("weight")
        linear.weight = nn.Parameter(torch.zeros(4, 4))
        assert not contents.unchanged()


@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES.keys())
def test_of_parts_that_are_left_out_only_their_places_count(name: str, change: Callable[[Model], object]) -> None:
    model = Model()
    contents = ModuleContents(model, list(model.blocks))
    change(model)
    inside = {"written", "parameter replaced", "parameter gone", "first buffer of a module"}
    inside |= {"first submodule of a module", "submodule replaced"}
    assert contents.unchanged() == (name in inside)


def test_parts_that_are_left_out_are_not_mistaken_for_others_at_their_address() -> None:
    model = nn.Sequential(nn.SiLU())
    for _ in range(20):
        contents = ModuleContents(model, [model[0]])
        model._modules.clear()
        model._modules["0"] = nn.SiLU()
        assert not contents.unchanged()


def test_nothing_is_kept_alive() -> None:
    model = Model()
    contents = ModuleContents(model)
    block, weight = weakref.ref(model.blocks[1]), weakref.ref(model.blocks[1][0].weight)
    del model.blocks[1]
    gc.collect()
    assert block() is None
    assert weight() is None
    assert not contents.unchanged()
    del model
    gc.collect()
    assert not contents.unchanged()


def test_tensors_are_those_of_all_modules() -> None:
    model = Model()
    expected = {id(x) for x in (*model.parameters(), *model.buffers())}
    assert {id(x) for x in module_tensors(model)} == expected


def test_scripted_submodules_have_containers_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4)))
    contents = ModuleContents(model)
    gc.collect()
    assert contents.unchanged()
    assert {id(x) for x in module_tensors(model)} == {id(x) for x in model.parameters()}
    with torch.no_grad():
        model[1].weight.zero_()
    assert not contents.unchanged()
