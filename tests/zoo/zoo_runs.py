"""Compile a model of the zoo, call it once, or run a whole generation of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from zoo_model import Prompt, ZooModel, first_tensor
from zoo_models import ZOO

import lite_compile
from lite_compile import Report

OPTIONS: dict[str, Any] = {"inner": "eager", "min_seq_len": 64}


def compile_model(model: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    """`model` compiled anew with our backend, and an empty report."""
    torch._dynamo.reset()
    lite_compile.clear_report()
    return torch.compile(model, backend="liteattention", options={**OPTIONS, **options})


@dataclass(frozen=True)
class Observation:
    """One call of a compiled model that skips nothing."""

    report: Report
    dense: Tensor
    """What the model gives without compilation."""
    sparse: Tensor


@torch.no_grad()
def observe(zoo: ZooModel, **options: Any) -> Observation:
    """Call a model once, compiled and not. Compiled first, since the first call of some prepares tables."""
    model = zoo.make()

    def call(function: Callable[..., Any]) -> Tensor:
        return first_tensor(function(**zoo.arguments(zoo.noise(0), torch.tensor([500.0]), Prompt(0))))

    sparse = call(compile_model(model, threshold=-math.inf, **options))
    report = lite_compile.report()
    return Observation(report, call(model), sparse)


@torch.no_grad()
def generate(zoo: ZooModel, model: Callable[..., Any], number: int, steps: int = 6) -> Tensor:
    """Generation `number`, with its own noise and prompts: an Euler sampler with sequential guidance."""
    latents = zoo.noise(number)
    for step in range(steps):
        t = torch.tensor([1000.0 * (1 - step / steps)])
        guided, unguided = (
            velocity(model(**zoo.arguments(latents, t, Prompt(10 * number + stream))), latents) for stream in range(2)
        )
        latents = latents - (unguided + 3.0 * (guided - unguided)) / steps
    return latents


def velocity(output: Any, latents: Tensor) -> Tensor:
    """The prediction for `latents`, without the variances that some models predict as well."""
    prediction = first_tensor(output)
    return prediction.flatten()[: latents.numel()].reshape(latents.shape)


def generate_alone(name: str, number: int) -> Tensor:
    """A generation of a model that has never been run before."""
    zoo = ZOO[name]
    return generate(zoo, compile_model(zoo.make(), threshold=-1.0), number)
