"""Whose mask it is: models that differ in anything, and announcements that are meant for somebody, share none."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from models import DEVICE, compiled, denoise, noise, prompt, tiny_wan

import lite_compile
from lite_compile.announce import active_generation
from lite_compile.layer_state import bindings


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def arguments(t: float = 1000.0) -> dict[str, Any]:
    """Of one call of the tiny model."""
    return {
        "hidden_states": noise(0),
        "timestep": torch.tensor([t], device=DEVICE),
        "encoder_hidden_states": prompt(0),
        "return_dict": False,
    }


def test_any_parameter_that_changes_makes_another_model() -> None:
    """What a mask was made of is not only the queries' weights."""
    for change in (
        lambda m: m.patch_embedding.weight.copy_(m.patch_embedding.weight * 1.5),
        lambda m: m.blocks[0].attn1.to_k.weight.add_(0.1),
        lambda m: m.blocks[1].ffn.net[2].weight.zero_(),
    ):
        torch._dynamo.reset()
        used, fresh = tiny_wan(), tiny_wan()
        run = compiled(used)
        denoise(run, noise(0), [prompt(0)], 6, stop_after=4)
        with torch.no_grad():
            change(used)
            change(fresh)
        call = arguments(300.0)
        with torch.no_grad():
            assert torch.equal(run(**call)[0], compiled(fresh)(**call)[0])


def test_weights_replaced_behind_autograd_before_a_run_begins_anew() -> None:
    """`.data` leaves no trace; a first step that comes again is a new generation all the same."""
    used, fresh = tiny_wan(), tiny_wan()
    run = compiled(used)
    denoise(run, noise(0), [prompt(0), prompt(1)], 6, stop_after=1)
    for model in (used, fresh):
        weight = model.blocks[0].attn1.to_q.weight
        weight.data = weight.data + 0.5
    result = denoise(run, noise(0), [prompt(0), prompt(1)], 6)
    assert torch.equal(result, denoise(compiled(fresh), noise(0), [prompt(0), prompt(1)], 6))


def test_models_that_share_all_but_one_weight_share_no_mask() -> None:
    first, second = tiny_wan(0), tiny_wan(0)
    for name, parameter in list(first.named_parameters()):
        if name != "blocks.0.attn1.to_k.weight":
            owner, _, attribute = name.rpartition(".")
            setattr(second.get_submodule(owner), attribute, parameter)
    with torch.no_grad():
        second.blocks[0].attn1.to_k.weight.mul_(-1)
    runs = [compiled(model) for model in (first, second)]
    denoise(runs[0], noise(0), [prompt(0)], 6, stop_after=4)
    call = arguments(300.0)
    with torch.no_grad():
        result = runs[1](**call)[0]
        other = tiny_wan(0)
        other.blocks[0].attn1.to_k.weight.mul_(-1)
        assert torch.equal(result, compiled(other)(**call)[0])


def test_buffers_written_to_at_each_call_are_warned_about() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_wan()
            self.register_buffer("count", torch.zeros(1, device=DEVICE))

        def forward(self, **inputs: Any) -> Any:
            self.count.add_(1)
            return self.inner(**inputs)

    run = compiled(Counting().eval())
    with torch.no_grad():
        for _ in range(16):
            run(**arguments())
        with pytest.warns(UserWarning, match="no skip mask lasts"):
            run(**arguments())


def test_graphs_that_differ_inside_of_a_checkpoint_share_nothing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_wan()
            self.factor = 1.0

        def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> Any:
            scaled = checkpoint(lambda x: x * self.factor, hidden_states, use_reentrant=False)
            return self.inner(hidden_states=scaled, **inputs)

    model = Checkpointed().eval()
    run = compiled(model)
    with torch.no_grad():
        run(**arguments())
        before = len(bindings(model))
        model.factor = 2.0
        run(**arguments())
    assert len(bindings(model)) == before + 1


def test_a_generation_without_a_model_speaks_for_its_own_thread() -> None:
    seen: list[object] = []
    weight = torch.nn.Parameter(torch.zeros(1))

    def look() -> None:
        seen.append(active_generation([id(weight)]))

    with lite_compile.generation() as mine:
        assert active_generation([id(weight)]) is mine
        other = threading.Thread(target=look)
        other.start()
        other.join()
        with lite_compile.generation(torch.nn.ParameterList([weight])) as named:  # type: ignore[arg-type]
            other = threading.Thread(target=look)
            other.start()
            other.join()
    assert seen == [None, named]
