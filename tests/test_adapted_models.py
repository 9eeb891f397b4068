"""Models that something else has changed before they are compiled: LoRA adapters, quantised weights, offload hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import OPTIONS, TOLERANCE, denoise, noise, prompt, tiny_wan
from torch import Tensor

import lite_compile

PROMPTS = [prompt(0), prompt(9)]


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    lite_compile.clear_report()


def with_adapter() -> Any:
    peft = pytest.importorskip("peft", reason="LoRA adapters need peft")
    model = tiny_wan()
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model.eval()


def with_fused_adapter() -> Any:
    model = with_adapter()
    model.fuse_lora()
    return model


def quantised() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    model = tiny_wan()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def with_offload_hook() -> Any:
    """As `enable_model_cpu_offload` of a pipeline does it: a hook on the model moves it as a whole."""
    accelerate = pytest.importorskip("accelerate", reason="the hooks are accelerate's")
    model, _ = accelerate.cpu_offload_with_hook(tiny_wan(), execution_device="cpu")
    return model


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    """Without `fullgraph`: accelerate's hooks break graphs."""
    return torch.compile(model, backend="liteattention", options={**OPTIONS, **options})


def distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("make", [with_adapter, with_fused_adapter, quantised, with_offload_hook])
def test_an_adapted_model_is_rewritten_and_computes_the_same(make: Callable[[], Any]) -> None:
    model = make()
    exact = denoise(compiled(model, threshold=-math.inf), noise(0), PROMPTS, 3)
    assert [site.layer for site in lite_compile.report().rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert distance(exact, denoise(make(), noise(0), PROMPTS, 3)) < TOLERANCE
    assert distance(exact, denoise(tiny_wan(), noise(0), PROMPTS, 3)) > 0 or make is with_offload_hook


@pytest.mark.parametrize("make", [with_adapter, with_fused_adapter, quantised, with_offload_hook])
def test_generations_of_an_adapted_model_do_not_mix(make: Callable[[], Any]) -> None:
    model = make()
    run = compiled(model)
    denoise(run, noise(0), PROMPTS, 6)
    second = denoise(run, noise(1), [prompt(1), prompt(9)], 6)
    assert lite_compile.stats(model).density < 1
    torch._dynamo.reset()
    assert torch.equal(second, denoise(compiled(make()), noise(1), [prompt(1), prompt(9)], 6))


def test_an_adapter_fused_in_the_middle_of_a_generation_voids_the_masks() -> None:
    model = with_adapter()
    run = compiled(model)
    denoise(run, noise(0), PROMPTS, 4)
    model.fuse_lora()
    fused = denoise(run, noise(0), PROMPTS, 6)
    torch._dynamo.reset()
    assert torch.equal(fused, denoise(compiled(with_fused_adapter()), noise(0), PROMPTS, 6))


def test_weights_that_are_loaded_layer_by_layer_leave_the_model_as_it_was() -> None:
    """Hooks on every module: Dynamo gives up on the function that they all share, and runs attention eagerly."""
    accelerate = pytest.importorskip("accelerate", reason="sequential offload is accelerate's")
    model = tiny_wan()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    run = compiled(model)
    assert torch.equal(denoise(run, noise(0), PROMPTS, 3), denoise(tiny_wan(), noise(0), PROMPTS, 3))
    assert not lite_compile.report().rewritten
