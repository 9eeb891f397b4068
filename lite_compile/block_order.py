"""The order in which the blocks of a root run, and the parts of the root that they check themselves when they do."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch._dynamo import eval_frame

from .find_root import CALL, enters_compiled_code, frames
from .layer_state import Binding
from .module_contents import ModuleContents

_TORCH = (eval_frame.__file__, CALL.co_filename)
"""Files whose code stands between a compiled forward and the call of its module."""


Ran = tuple[int, int]
"""A block that ran: the numbers of its graph and of its binding, which no other ones ever have."""
END: Ran = (0, 0)
"""What comes after the last block."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a block that runs checks. It keeps nothing alive."""

    binding: weakref.ref[Binding]
    owner: weakref.ref[nn.Module] | None
    """The module whose call it is."""
    whole: bool
    """Whether its graph is all that the forward of that module does."""


class BlockOrder:
    """Blocks that run one after the other, and all that a root holds but for what they check themselves."""

    def __init__(self, blocks: Sequence[Ran], steps: Sequence[Step], rest: ModuleContents) -> None:
        self.blocks = (*blocks, END)
        self.rest = rest
        self.gone = False
        """Whether a binding is gone, so that its block has another one, which may check less."""
        self._first = steps[0].owner
        forget = partial(_forget, weakref.ref(self))
        bindings = [step.binding() for step in steps]
        self._watches = [weakref.ref(binding, forget) for binding in bindings if binding is not None]
        if len(self._watches) < len(steps):
            self.gone = True

    def begins_with(self, step: Step) -> bool:
        """Whether that is a call of the module whose call is the first one."""
        if self._first is None or step.owner is None:
            return False
        owner = step.owner()
        return owner is not None and owner is self._first()


def learn_order(module: nn.Module, blocks: Sequence[Ran], steps: Sequence[Step]) -> BlockOrder | None:
    """The order of these blocks in `module`; None if they check no part of it."""
    checked = checked_parts(module, steps)
    return BlockOrder(blocks, steps, ModuleContents(module, checked)) if checked else None


def checked_parts(module: nn.Module, steps: Sequence[Step]) -> list[nn.Module]:
    """The largest parts of `module` whose contents the blocks that ran check themselves.

    All that such a part holds is taken by the graph of a module that it lies in, or is, and this graph is all that the
    forward of that module does. It holds some tensor. Neither its tensors nor its modules, nor what they lie in, are
    found anywhere else in `module`, where something else could use them earlier.
    """
    parts = list(module.modules())
    places = Counter(id(x) for part in parts for x in _tensors(part))
    holders = Counter(id(child) for part in parts for child in part._modules.values())
    in_pieces = {step.owner() for step in steps if step.owner is not None and not step.whole}
    taken: dict[nn.Module, set[int | None]] = {}
    for step in steps:
        owner = None if step.owner is None else step.owner()
        binding = step.binding()
        if owner is not None and binding is not None and owner not in in_pieces:
            taken.setdefault(owner, set(binding.ids()))

    def is_checked(part: nn.Module, by: set[int | None]) -> bool:
        return (
            holders[id(part)] == 1
            and all(places[id(x)] == 1 and id(x) in by for x in _tensors(part))
            and all(is_checked(child, by) for child in part.children())
        )

    found: list[nn.Module] = []

    def search(part: nn.Module, by: set[int | None] | None) -> None:
        by = taken.get(part, by)
        if by is not None and is_checked(part, by) and any(True for inner in part.modules() for _ in _tensors(inner)):
            found.append(part)
            return
        for child in part.children():
            if holders[id(child)] == 1:
                search(child, by)

    search(module, None)
    return found


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that `part` itself holds, one that is there under two names twice."""
    for held in (part._parameters, part._buffers):
        yield from (x for x in held.values() if x is not None)


def running_step(whole: bool, binding: Binding) -> Step:
    """The block that is running.

    Args:
        whole: whether its graph is all that the compiled function does.
        binding: what it was found to be.
    """
    inside: list[CodeType] = []
    compiled = True
    for frame in frames(sys._getframe(1)):
        if frame.f_code is CALL:
            owner = frame.f_locals["self"]
            whole = whole and len(inside) == 1 and _place_of(inside[0]) == _place_of(_forward_code(owner))
            return Step(weakref.ref(binding), weakref.ref(owner), whole)
        ours = str(frame.f_globals.get("__name__")).partition(".")[0] == __package__
        if enters_compiled_code(frame):
            compiled = False
        elif compiled and not ours and frame.f_code.co_filename not in _TORCH:
            inside.append(frame.f_code)
    return Step(weakref.ref(binding), None, False)


def _forward_code(module: nn.Module) -> CodeType | None:
    forward: Any = module.forward
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return getattr(getattr(forward, "__func__", forward), "__code__", None)


def _place_of(code: CodeType | None) -> tuple[str, int, str] | None:
    """Where a function was written, which Dynamo's code for it has as well."""
    return None if code is None else (code.co_filename, code.co_firstlineno, code.co_name)


def _forget(order: weakref.ref[BlockOrder], _: object) -> None:
    if (found := order()) is not None:
        found.gone = True
