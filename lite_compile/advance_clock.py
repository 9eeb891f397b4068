"""`clock.advance` outside of a graph: some hundred small operators, compiled to a few kernels on GPUs.

The graph is handed to Inductor as it is, without Dynamo: no guards, no limit of recompilations, and nothing that
`torch._dynamo.reset()` undoes. What was compiled is found again by the shapes, strides and dtypes of its inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from .clock import RESET, advance
from .trajectory import NONE_DENSE, DenseSteps

MAX_COMPILED = 4
"""Signatures that are compiled for one clock. With more, the prompts of a run have ever other lengths, say."""
MAX_NUMBERS = 64


@dataclass(frozen=True)
class ClockRules:
    """How a clock is advanced."""

    max_streams: int
    device: torch.device
    dense_steps: DenseSteps = NONE_DENSE
    refresh_every: int = 0
    compiled: bool = False
    """Whether Inductor compiles it."""
    key: tuple[Hashable, ...] = field(init=False, compare=False)
    """Equal for equal rules."""

    def __post_init__(self) -> None:
        steps = self.dense_steps.key
        object.__setattr__(self, "key", (self.max_streams, self.device, *steps, self.refresh_every, self.compiled))


class ClockAdvance:
    """Advances one clock.

    Compiled code may round the sums in a fingerprint otherwise, and then a prompt would not be known again. So what was
    decided for a signature holds for as long as the clock lives.
    """

    def __init__(self, rules: ClockRules) -> None:
        self._rules = rules
        self._known: dict[Hashable, Callable[..., Any]] = {}
        self._numbers: dict[float, Tensor] = {}

    def __call__(
        self, clock: Tensor, latents: Sequence[Tensor], timestep: Tensor | float, conditions: Sequence[Tensor | float]
    ) -> Tensor:
        """`clock.advance`; `timestep` and `conditions` may be numbers."""
        t = timestep
        if not isinstance(t, Tensor):
            t = torch.full((1,), float(t), dtype=torch.float32, device=clock.device)
        if not self._rules.compiled:
            return self._eager(clock, latents, t, conditions)
        inputs = [self._on_device(x) for x in (*latents, t, *conditions)]
        signature = (len(latents), *((x.shape, x.stride(), x.dtype) for x in inputs))
        run = self._known.get(signature)
        if run is not None:
            return cast(Tensor, run(clock, *inputs)[0])
        if len(self._known) < MAX_COMPILED:
            return self._first(signature, clock, inputs, len(latents))
        return self._eager(clock, *_split(inputs, len(latents)))

    def _eager(
        self, clock: Tensor, latents: Sequence[Tensor], timestep: Tensor, conditions: Sequence[Tensor | float]
    ) -> Tensor:
        rules = self._rules
        return advance(clock, latents, timestep, conditions, rules.max_streams, rules.dense_steps, rules.refresh_every)

    def _first(self, signature: Hashable, clock: Tensor, inputs: list[Tensor], latents: int) -> Tensor:
        """The first call of a signature: compile, or find that it cannot be done."""
        try:
            run = compile_graph(self._graph(len(inputs), latents), [clock, *inputs])
            now = cast(Tensor, run(clock, *inputs)[0])
        except Exception as error:
            warnings.warn(
                f"the step clock could not be compiled and runs operator by operator: {type(error).__name__}: {error}",
                stacklevel=2,
            )
            run = partial(self._as_compiled, latents)
            clock[RESET].fill_(1)  # it may have been written to in part
            now = run(clock, *inputs)[0]
        self._known[signature] = run
        return now

    def _as_compiled(self, latents: int, clock: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        """What stands in for compiled code where there is none."""
        return (self._eager(clock, *_split(inputs, latents)),)

    def _graph(self, inputs: int, latents: int) -> fx.GraphModule:
        """The graph of `advance` for a clock and that many inputs, the first of which are the latents."""
        graph = fx.Graph()
        clock = graph.placeholder("clock")
        given = [graph.placeholder(f"input_{i}") for i in range(inputs)]
        rules = self._rules
        arguments = (rules.max_streams, tuple(rules.dense_steps), rules.refresh_every)
        now = graph.call_function(advance, (clock, *_split(given, latents), *arguments))
        graph.output((now,))
        return fx.GraphModule({}, graph)

    def _on_device(self, x: Tensor | float) -> Tensor:
        """A tensor on the clock's device: what is compiled for several would be compiled for the CPU as well."""
        if isinstance(x, Tensor):
            x = x.resolve_conj().resolve_neg()  # compiled code reads the memory as it is
            return x if x.device == self._rules.device else x.to(self._rules.device)
        if x not in self._numbers:
            if len(self._numbers) >= MAX_NUMBERS:
                self._numbers.clear()
            # `identify` takes numbers in float64 as well.
            self._numbers[x] = torch.full((1,), x, dtype=torch.float64, device=self._rules.device)
        return self._numbers[x]


def _split(inputs: Sequence[Any], latents: int) -> tuple[list[Any], Any, list[Any]]:
    """Latents, timestep and conditions."""
    return list(inputs[:latents]), inputs[latents], list(inputs[latents + 1 :])


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph that returns a tuple. Threads take turns, also with those that compile models."""
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor.compile_fx import compile_fx  # takes two seconds to import

    with compile_lock:
        # A CUDA graph of its own would copy the inputs of each call.
        return cast(Callable[..., Any], compile_fx(graph, list(inputs), config_patches={"triton.cudagraphs": False}))
