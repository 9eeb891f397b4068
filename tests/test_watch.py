"""What is known of tensors that are not held: among them those that modules move by swapping contents."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import swap_tensors

import lite_compile
from lite_compile.layer_state import bindings
from lite_compile.lifetime import Watch


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


@pytest.fixture
def modules_swap() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def two(size: int = 4) -> Any:
    return TwoTensor(torch.ones(size, size), torch.ones(size, size))


def watched(tensor: Tensor) -> tuple[Watch, list[object]]:
    ends: list[object] = []
    return Watch(tensor, ends.append), ends


@pytest.mark.parametrize(
    "make", [two, lambda: torch.ones(4), lambda: nn.Parameter(two()), lambda: nn.Parameter(torch.ones(4))]
)
def test_the_end_of_a_tensor_is_told(make: Any) -> None:
    tensor, other = make(), make()
    watch, ends = watched(tensor)
    assert watch.alive
    assert watch.is_of(tensor)
    assert not watch.is_of(other)
    assert not ends
    del tensor
    gc.collect()
    assert not watch.alive
    assert len(ends) == 1


def test_a_copy_is_another_tensor() -> None:
    tensor = two()
    watch, ends = watched(tensor)
    for other in (copy.deepcopy(tensor), copy.copy(tensor)):
        assert not watch.is_of(other)
    deep = copy.deepcopy(tensor)
    del tensor, other
    gc.collect()
    assert len(ends) == 1
    assert not watch.is_of(deep)


def test_contents_that_were_swapped_away_are_not_those_watched() -> None:
    tensor, other = two(), two()
    watch, ends = watched(tensor)
    swap_tensors(tensor, other)
    assert watch.alive
    assert not watch.is_of(tensor)
    assert not watch.is_of(other)
    swap_tensors(tensor, other)
    assert watch.is_of(tensor)
    swap_tensors(tensor, other)
    del other
    gc.collect()
    assert len(ends) == 1


def test_modules_that_always_swap_can_be_moved(modules_swap: None) -> None:
    module = nn.Linear(4, 4)
    watch, _ = watched(module.weight)
    module.to(torch.float64)
    assert not watch.is_of(module.weight)


def test_a_watched_tensor_is_saved_as_any_other() -> None:
    tensor = nn.Parameter(two())
    watched(tensor)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    with torch.serialization.safe_globals([TwoTensor]):
        found = torch.load(file, weights_only=True)
    assert torch.equal(found.a, tensor.a)
    watch, _ = watched(found)
    assert watch.is_of(found)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)
        self.qkv.weight = nn.Parameter(4 * torch.eye(32).repeat(3, 1))  # each token attends to those like it

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, x.shape[1], 3, 1, 32).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """One block of attention, and a layer whose weight is of a tensor subclass, as torchao's are."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = nn.Linear(32, 32, bias=False)
        weight = self.out.weight.detach()
        self.out.weight = nn.Parameter(TwoTensor(weight, weight.clone()))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.out(self.block(hidden_states)) + 0 * timestep


@pytest.mark.parametrize("part", ["model", "block"])
def test_a_model_of_tensor_subclasses_can_be_moved_after_it_ran(part: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    options = {"threshold": -2.0, "min_seq_len": 64, "inner": "eager"}
    run = torch.compile(model, backend="liteattention", options=options) if part == "model" else model
    if part == "block":
        model.block.compile(backend="liteattention", options=options)

    def density(dtype: torch.dtype) -> list[float]:
        """Of three steps of one generation."""
        found = []
        kinds = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        start = kinds.repeat_interleave(64, 1)
        for step in range(3):
            run(start * (1 - 0.01 * step), torch.tensor([900.0 - step], dtype=dtype))
            found.append(lite_compile.stats(model).density)
        return found

    with torch.no_grad():
        before = density(torch.float32)
        assert before[0] == 1 > before[-1]
        assert bindings(model)
        model.to(torch.float64).to(torch.float32)
        assert density(torch.float32) == before  # of its own first step nothing was skipped
