"""Find the call of the model above compiled blocks, and in it the latents, the timestep and all that may be a prompt.

The graphs of such blocks see neither latents nor timestep, but the call of the model does, and it is a Python frame
above them: `Module._wrapped_call_impl(self, *args, **kwargs)`.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils._pytree import tree_leaves

from .passes.find_clock_inputs import JOINT_LATENT_NAMES, LATENT_NAMES, TIMESTEP_NAMES
from .passes.graph_inputs import special_kind

RootFrame = tuple[nn.Module, FrameType, tuple[Any, ...], dict[str, Any]]
"""A module, the frame of a call of it, and the arguments of that call."""

CALL = nn.Module._wrapped_call_impl.__code__
"""What the frames of calls of modules run."""
_signatures: weakref.WeakKeyDictionary[Callable[..., Any], inspect.Signature] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ClockArguments:
    """What the clock reads of one call of a root module."""

    latents: tuple[Tensor, ...]
    timestep: Tensor | int | float
    conditions: tuple[Tensor | int | float, ...]
    """Everything else that may carry a prompt."""
    names: tuple[str, str]
    """Of the arguments that hold latents and timestep."""


def find_root() -> RootFrame | str:
    """The innermost module above the running code whose call shows latents and a timestep; or why there is none.

    Innermost, because a module around it may call it several times per call of its own, for guidance; but outside of
    what is compiled, where hooks would be traced instead of run. Blocks pass embeddings of two dimensions around as
    `timestep`: a module whose timestep has two, one per token, counts only if no other module calls it.
    """
    found: RootFrame | None = None
    per_token: RootFrame | None = None
    missing = "no module above the compiled part was called with latents and a timestep by these names"
    for frame in frames(sys._getframe(1)):
        if enters_compiled_code(frame):
            found = per_token = None
        if frame.f_code is not CALL or found is not None:
            continue
        per_token = None
        module, args, kwargs = (frame.f_locals[name] for name in ("self", "args", "kwargs"))
        arguments = read_arguments(module, args, kwargs)
        if isinstance(arguments, str):
            continue
        if module._compiled_call_impl is not None:
            missing = f"{type(module).__name__} was compiled by model.compile(), which hides its calls; "
            missing += "use torch.compile(model)"
            continue
        if isinstance(arguments.timestep, Tensor) and arguments.timestep.dim() > 1:
            per_token = (module, frame, args, kwargs)
        else:
            found = (module, frame, args, kwargs)
    return found or per_token or missing


def is_below_root(layers: Collection[str], tensors: Collection[Tensor]) -> bool:
    """Whether a graph with these layers and parameters is of a module below the root, one of several.

    It is none that reads half of the root's parameters (a whole denoiser in a wrapper that is called with latents and
    timestep), nor one that calls a layer what the root calls it (what a graph break leaves of the root's forward);
    but of two layers of one name the parameters tell. What is found wrongly to be a block (a whole denoiser that holds
    less than half of what its wrapper does) is left dense only where it has little work.
    """
    root = find_root()
    if isinstance(root, str):
        return False
    model = getattr(root[0], "_orig_mod", root[0])
    known, held = set(map(id, model.parameters())), set(map(id, tensors))
    if 2 * len(known & held) >= len(known):
        return False
    modules = dict(model.named_modules())
    of_same_name = (set(map(id, modules[layer].parameters())) for layer in layers if layer in modules)
    return all(parameters and not parameters & held for parameters in of_same_name)


def read_arguments(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> ClockArguments | str:
    """Latents, timestep and conditioning among the arguments of a call, by their names; or what is missing."""
    original = getattr(module, "_orig_mod", module)
    try:
        signature = _signature(original.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return "the arguments do not fit the signature of forward"
    named = dict(bound)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    latents = {n: tensors for n, x in named.items() if n in LATENT_NAMES and (tensors := _as_latents(x))}
    timesteps = {n: x for n, x in named.items() if n in TIMESTEP_NAMES and _is_timestep_like(x)}
    if not latents or not timesteps:
        return "no argument is named like latents" if not latents else "no argument is named like a timestep"
    name = max(latents, key=lambda n: sum(x.numel() for x in latents[n]))
    time = next(iter(timesteps))
    joint = {n: tensors for n, x in named.items() if n in JOINT_LATENT_NAMES and (tensors := _as_latents(x))}
    rest = tree_leaves([value for key, value in named.items() if key not in (name, time, *joint)])
    conditions = []
    for leaf in rest:
        condition = _as_condition(leaf)
        if condition is None:
            return f"an argument holds a {type(leaf).__name__}, which the clock cannot watch"
        conditions.append(condition)
    all_latents = itertools.chain(latents[name], *joint.values())
    return ClockArguments(tuple(all_latents), timesteps[time], tuple(conditions), (name, time))


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Signature of a method; of one that is not patched, it is read only once."""
    if not inspect.ismethod(forward):
        return inspect.signature(forward)
    function = forward.__func__
    if function not in _signatures:
        _signatures[function] = inspect.signature(forward)
    return _signatures[function]


def describe_root(found: RootFrame) -> str:
    """One line for the report."""
    module, _, args, kwargs = found
    arguments = read_arguments(module, args, kwargs)
    assert not isinstance(arguments, str)
    latents, timestep = arguments.names
    name = type(getattr(module, "_orig_mod", module)).__name__
    return f"hooks on {name}: latents from {latents!r}, timestep from {timestep!r}"


def _as_latents(x: object) -> tuple[Tensor, ...]:
    """The tensors of an argument that holds latents, or a list of them; none if it holds anything else."""
    tensors = x if isinstance(x, list | tuple) else (x,)
    return tuple(tensors) if all(map(_is_latent_like, tensors)) else ()


def _is_latent_like(x: object) -> bool:
    if not isinstance(x, Tensor) or special_kind(x) or x.is_meta:
        return False
    return x.is_floating_point() and x.dim() >= 3 and x.numel() > 0


def _is_timestep_like(x: object) -> bool:
    if isinstance(x, Tensor):
        return x.dim() <= 2 and x.numel() > 0 and x.dtype != torch.bool and not x.is_complex() and not x.is_meta
    return isinstance(x, int | float) and not isinstance(x, bool) and _is_exact(x)


def _as_condition(leaf: object) -> Tensor | int | float | None:
    """A leaf of the arguments as the clock takes it; None for what it cannot compare."""
    if isinstance(leaf, Tensor):
        return None if special_kind(leaf) or leaf.is_meta else leaf
    if isinstance(leaf, int | float) and _is_exact(leaf):
        return leaf
    if leaf is None:
        return 0
    # Within a process equal values have equal hashes, and the clock does not outlive it.
    return hash(leaf) % 2**31 if isinstance(leaf, int | str | bytes | torch.dtype | torch.device) else None


def _is_exact(number: int | float) -> bool:
    """Whether float64, in which the clock compares numbers, holds it as it is."""
    return isinstance(number, float) or abs(number) <= 2**53


def enters_compiled_code(frame: FrameType) -> bool:
    """Whether this is the frame of Dynamo's that calls what was compiled."""
    code = frame.f_code
    return code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame, and those that called it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back
