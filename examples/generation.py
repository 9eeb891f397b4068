"""One measured generation of a diffusers pipeline: seconds and density per step, number of compilations."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics

import lite_compile

Densities = dict[tuple[str, int], float]
"""Density of the last call per (layer, stream)."""

DENOISERS = ("transformer", "transformer_2", "unet")
BACKENDS = ("liteattention", "inductor", "eager")


def compile_for(backend: str, model: nn.Module, options: dict[str, Any] | None) -> Any:
    """`model` compiled by one of `BACKENDS`; `options` are for liteattention."""
    if backend == "eager":
        return model
    if backend == "inductor":
        return torch.compile(model)
    if backend == "liteattention":
        return torch.compile(model, backend="liteattention", options=options)
    raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")


def without_history(model: nn.Module) -> nn.Module:
    """`model`, or a copy of it where an earlier run left its states, which `lite_compile.stats` would count as well."""
    return copy.deepcopy(model) if lite_compile.stats(model).streams else model


@dataclass
class Run:
    """What one generation left behind."""

    latents: Tensor | None = None
    output: Any = None
    step_seconds: list[float] = field(default_factory=list)
    densities: list[Densities] = field(default_factory=list)
    compilations: int = 0
    graph_breaks: int = 0
    recompilations: int = 0

    @property
    def first(self) -> float:
        return self.step_seconds[0]

    @property
    def steady(self) -> float:
        """Median seconds of the steps after the first."""
        return statistics.median(self.step_seconds[1:])


class Job:
    """A pipeline, the arguments of its call, and its uncompiled denoisers by attribute name."""

    def __init__(self, pipe: DiffusionPipeline, arguments: dict[str, Any], device: torch.device) -> None:
        self.pipe, self.arguments, self.device = pipe, arguments, device
        found = {name: getattr(pipe, name, None) for name in DENOISERS}
        self.denoisers: dict[str, nn.Module] = {name: m for name, m in found.items() if isinstance(m, nn.Module)}
        if not self.denoisers:
            raise ValueError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}; nothing to compile")
        self.seed = 0

    def densities(self) -> Densities:
        streams = [s for model in self.denoisers.values() for s in lite_compile.stats(model).streams]
        return {(s.layer, s.stream): s.density for s in streams}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self, backend: str, options: dict[str, Any] | None = None) -> Run:
        """One generation with denoisers freshly compiled by one of `BACKENDS`."""
        torch._dynamo.reset()
        counters.clear()
        known_metrics = len(get_compilation_metrics())
        self.denoisers = {name: without_history(model) for name, model in self.denoisers.items()}
        for name, model in self.denoisers.items():
            setattr(self.pipe, name, compile_for(backend, model, options))
        run, started = Run(), 0.0

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal started
            self.synchronize()
            run.step_seconds.append(time.perf_counter() - started)
            run.latents = tensors["latents"]
            if backend == "liteattention":
                run.densities.append(self.densities())
            started = time.perf_counter()
            return {}

        self.pipe.set_progress_bar_config(desc=f"{backend:<13}")
        generator = torch.Generator(self.device).manual_seed(self.seed)
        started = time.perf_counter()
        run.output = self.pipe(
            **self.arguments, generator=generator, callback_on_step_end=on_step_end, return_dict=False
        )[0]
        for name, model in self.denoisers.items():
            setattr(self.pipe, name, model)
        run.compilations = counters["stats"]["unique_graphs"]
        run.graph_breaks = sum(counters["graph_break"].values())
        run.recompilations = sum(bool(m.recompile_reason) for m in get_compilation_metrics()[known_metrics:])
        return run


def density_table(steps: Sequence[Densities], rows: int = 25, width: int = 40) -> list[str]:
    """One line per step, or `rows` evenly chosen ones: mean, per stream, and a bar."""
    if not steps or not steps[-1]:
        return ["nothing was rewritten; the reasons stand above"]
    streams = sorted({stream for step in steps for _, stream in step})
    lines = [f"step  {'mean':>5}  " + "".join(f"{f'stream {s}':>9}" for s in streams)]
    chosen = range(len(steps)) if len(steps) <= rows else [i * (len(steps) - 1) // (rows - 1) for i in range(rows)]
    for number in chosen:
        step = steps[number]
        per_stream = [[d for (_, stream), d in step.items() if stream == s] for s in streams]
        mean = statistics.fmean(step.values()) if step else 1.0
        cells = "".join(f"{statistics.fmean(d):9.3f}" if d else " " * 9 for d in per_stream)
        lines.append(f"{number + 1:>4}  {mean:5.3f}  {cells}   {'#' * round(mean * width)}")
    return lines
