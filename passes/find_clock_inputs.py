"""Find the inputs that tell the step clock where a call stands: latents, timestep, conditioning."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..clock import identify
from .attention_site import AttentionSite
from .graph_inputs import (
    argument_name,
    fake_mode,
    fake_tensor,
    fake_value,
    is_buffer,
    is_parameter,
    is_sized,
    is_static,
    list_name,
    placeholders,
    size_hint,
    source_name,
    special_kind,
)
from .planned_nodes import Operand, PlannedNode

LATENT_NAMES = {
    "hidden_states", "sample", "x", "latents", "latent", "noisy_latents", "latent_model_input", "img", "video",
    "z", "zt", "x_t",
}  # fmt: skip
JOINT_LATENT_NAMES = {"audio_hidden_states", "audio_latents"}
"""Inputs that are denoised together with the latents, so that they change at each step and carry no prompt."""
TIMESTEP_NAMES = {"timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "time_step"}

_TOWARDS_EMBEDDING = {
    "to", "float", "half", "bfloat16", "double", "type_as", "type", "view", "reshape", "flatten", "unflatten",
    "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "contiguous", "mul", "div", "add", "sub", "neg", "clone",
    "detach",
    operator.getitem, operator.mul, operator.truediv, operator.add, operator.sub, operator.neg,
    torch.mul, torch.div, torch.add, torch.sub, torch.outer, torch.unsqueeze, torch.flatten, torch.reshape,
}  # fmt: skip
_RESUMED = "torch_dynamo_resume_in"
_EMBEDDING = {"sin", "cos", torch.sin, torch.cos}


@dataclass(frozen=True)
class ClockInputs:
    """Graph inputs that the step clock reads."""

    latents: fx.Node
    timestep: fx.Node
    conditions: tuple[fx.Node, ...]
    more_latents: tuple[fx.Node, ...] = ()
    """What is denoised together with `latents`: the rest of a list of images, the sound of a video."""

    @property
    def per_step(self) -> tuple[fx.Node, ...]:
        """What changes from step to step."""
        return (self.latents, *self.more_latents, self.timestep)

    def __str__(self) -> str:
        names = [argument_name(node) or node.name for node in (self.latents, self.timestep)]
        return f"latents from {names[0]!r}, timestep from {names[1]!r}, {len(self.conditions)} conditioning inputs"


def find_clock_inputs(gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> ClockInputs | str:
    """The clock's inputs by argument name, else by data flow; or what is missing, as text.

    *Latents* are called so or feed the queries of an attention site. Among several, those that do both come first, then
    the argument's name decides, then the shape of the output, then size. The *timestep* is a small input, one value per
    sample or per token, that is named so or that reaches a sine or cosine through pointwise operations.
    """
    if _continues_after_graph_break(gm):
        return "the graph continues after a graph break, so its inputs are not the model's"
    if _inside_of_a_module():
        return "a part of a model is compiled by itself, so its inputs are not the model's"
    inputs = [n for n in placeholders(gm.graph) if not is_static(n) and fake_tensor(n) is not None]
    latents = _find_latents(gm, inputs, sites)
    if latents is None:
        return "no input looks like latents"
    more_latents = tuple(n for n in inputs if n is not latents and _is_denoised_with(latents, n))
    rest = [n for n in inputs if n is not latents and n not in more_latents]
    timestep = _find_timestep(gm, rest, [latents, *more_latents])
    if timestep is None:
        return "no tensor input looks like a timestep"
    known = {latents, timestep, *more_latents}
    conditions = tuple(n for n in placeholders(gm.graph) if n not in known and _is_condition(n))
    return ClockInputs(latents, timestep, conditions, more_latents)


def find_unreadable(gm: fx.GraphModule) -> str | None:
    """An input that no clock could compare with that of another call, and why, as text."""
    for node in placeholders(gm.graph):
        value = fake_tensor(node) if _is_condition(node) else None
        problem = "" if value is None else special_kind(value) or _tracing_error(gm, value)
        if problem:
            return f"the clock cannot read {argument_name(node) or source_name(node) or node.name!r}: {problem}"
    return None


def _tracing_error(gm: fx.GraphModule, value: torch.Tensor) -> str:
    """What keeps the clock from being traced with this condition (a quantised tensor, say)."""
    try:
        with fake_mode(gm), torch.no_grad():
            identify([value], value.device)
    except Exception as error:  # whatever it is, the model without a clock still runs
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _is_condition(node: fx.Node) -> bool:
    """Everything that may carry a prompt; parameters and buffers are watched by identity and version instead."""
    kinds = torch.Tensor | torch.SymInt | torch.SymFloat
    return isinstance(fake_value(node), kinds) and not is_parameter(node) and not is_buffer(node)


def _continues_after_graph_break(gm: fx.GraphModule) -> bool:
    return any(_RESUMED in node.meta.get("stack_trace", "") for node in gm.graph.nodes)


def _inside_of_a_module() -> bool:
    """Whether the code being compiled was called by the `forward` of a module: it is a part of a model."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount > 0:
            receiver = frame.f_locals.get(code.co_varnames[0])
            if isinstance(receiver, torch.nn.Module):
                return True
        frame = frame.f_back
    return False


def _find_latents(gm: fx.GraphModule, inputs: list[fx.Node], sites: Sequence[AttentionSite]) -> fx.Node | None:
    reaching = _ancestors([site.q for site in sites])
    candidates = [n for n in inputs if n in reaching and _is_latent_like(n)]
    named = [n for n in inputs if argument_name(n) in LATENT_NAMES and _is_latent_like(n)]
    outputs = [value for n in gm.graph.output_node().all_input_nodes if (value := fake_tensor(n)) is not None]
    shaped = [n for n in candidates if any(_same_shape(n, value) for value in outputs)]
    both = [n for n in named if n in reaching]
    return max(both or named or shaped or candidates, key=_size, default=None)


def _is_denoised_with(latents: fx.Node, node: fx.Node) -> bool:
    """Whether an input is the like of `latents` in the list that holds them, or by its name denoised as well."""
    if not _is_latent_like(node):
        return False
    value = fake_tensor(node)
    assert value is not None
    same_list = list_name(node) != "" and list_name(node) == list_name(latents)
    return (same_list and _same_shape(latents, value)) or argument_name(node) in JOINT_LATENT_NAMES


def _is_latent_like(node: fx.Node) -> bool:
    value = fake_tensor(node)
    if value is None or not value.is_floating_point() or value.dim() < 3:
        return False
    return not special_kind(value) and is_sized(value)


def _same_shape(node: fx.Node, output: torch.Tensor) -> bool:
    value = fake_tensor(node)
    return (
        value is not None
        and value.dim() == output.dim()
        and all(statically_known_true(a == b) for a, b in zip(value.shape, output.shape, strict=True))
    )


def _size(node: fx.Node) -> int:
    value = fake_tensor(node)
    assert value is not None
    return size_hint(value.numel()) or 0


def _find_timestep(gm: fx.GraphModule, inputs: list[fx.Node], latents: list[fx.Node]) -> fx.Node | None:
    images = [n for n in latents if list_name(n)]
    batch = len(images) if len(images) > 1 else fake_tensor(latents[0]).shape[0]  # type: ignore[union-attr]
    candidates = [n for n in inputs if _is_timestep_like(n, batch)]
    embedded = [n for n in candidates if _reaches_embedding(n)]
    flat = [n for n in candidates if fake_tensor(n).dim() <= 1]  # type: ignore[union-attr]
    named = [n for n in (*embedded, *flat) if argument_name(n) in TIMESTEP_NAMES]
    if named:
        return named[0]
    # Position ids and guidance scales reach a sine as well: a guess has to be the only one.
    unnamed = [n for n in embedded if not argument_name(n).startswith("guidance")]
    return unnamed[0] if len(unnamed) == 1 and not _has_timestep_number(gm) else None


def _has_timestep_number(gm: fx.GraphModule) -> bool:
    """Whether the timestep is a Python number."""
    return any(argument_name(n) in TIMESTEP_NAMES for n in placeholders(gm.graph) if fake_tensor(n) is None)


def _is_timestep_like(node: fx.Node, batch: int | torch.SymInt) -> bool:
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or value.is_complex() or value.dim() > 2:
        return False
    if special_kind(value) or not is_sized(value):
        return False
    return (
        value.dim() == 0 or statically_known_true(value.shape[0] == batch) or statically_known_true(value.numel() == 1)
    )


def _reaches_embedding(start: fx.Node) -> bool:
    seen, pending = {start}, [start]
    while pending:
        for user in pending.pop().users:
            if user.target in _EMBEDDING:
                return True
            if user.target in _TOWARDS_EMBEDDING and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _ancestors(nodes: Sequence[object]) -> set[Operand]:
    pending: list[Operand] = [n for n in nodes if isinstance(n, fx.Node | PlannedNode)]
    seen = set(pending)
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return seen
