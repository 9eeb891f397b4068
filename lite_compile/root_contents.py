"""Whether a root still consists of what it did, looked at in the course of its calls rather than when they begin.

A compiled block checks whatever its graph takes, each time that it runs. Calls whose blocks run in an order that is
known look through the rest alone when they begin: before a block uses its masks, all that ran before it was checked in
this call, and what runs after it cannot influence it.
"""

from __future__ import annotations

import weakref

from torch import nn

from .block_order import END, BlockOrder, Ran, Step, learn_order, running_step
from .layer_state import Binding
from .module_contents import ModuleContents


class RootContents:
    """The contents of a root, the order in which its blocks run, and how far the running call has come in it.

    An order is learnt from a call if the two before had it as well, so that calls in turns of two orders cost nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._all = ModuleContents(module)
        self._order: BlockOrder | None = None
        self._judged: tuple[Ran, ...] = ()
        """The last order that was learnt, or turned out to check nothing."""
        # What the next call has to know of the last ones.
        self._in_order = False
        """Whether the last call kept to the order until its end."""
        self._doubted = False
        """Whether the root was called since that call began, and nobody followed."""
        self._last: tuple[Ran, ...] = ()
        """The blocks of the last call that was completed, if that is not the order that is known."""
        self._repeated: tuple[Ran, ...] = ()
        """The same, if the call before had them as well, and they were not judged yet."""
        # Of the running call.
        self._counts = False
        """Whether it says what the order is."""
        self._looked_through = True
        """Whether everything was looked through since it began."""
        self._awaited: tuple[Ran, ...] = (END,)
        self._place = 0
        """So many of the awaited blocks have run."""
        self._ran: list[Ran] | None = []
        """The blocks that ran, if they are not those that were awaited."""
        self._steps: list[Step] | None = None
        """What they check, if an order may be learnt from this call."""
        self.usable = True
        """Whether blocks may use their masks."""

    def begin(self, counts: bool = True) -> bool:
        """A call begins; whether anything changed since the last one did.

        Args:
            counts: whether no other call is in the middle, of which this one would hide the end.
        """
        if self._order is not None and self._order.gone:
            self._forget_order()
        order = self._order
        # What ran out of order at the last call was checked by nothing since that call began.
        rest = order.rest if order is not None and self._in_order and not self._doubted else None
        self._in_order = self._doubted = False
        self._counts, self.usable, self._looked_through = counts, True, rest is None
        if order is None or self._repeated:
            self._record()
        else:
            self._awaited, self._place, self._ran, self._steps = order.blocks, 0, None, None
        if (rest or self._all).unchanged():
            return False
        self._start_over()
        return True

    def expects(self, graph: int, binding: Binding) -> bool:
        """Whether this is the block that has to be next, which has checked itself; if so, another one is next."""
        # A binding that went since the call began may have been that of a block that ran out of sight, and had changed.
        if self._awaited[self._place] != (graph, binding.number) or (self._order is not None and self._order.gone):
            return False
        self._place += 1
        return True

    def note(self, graph: int, whole: bool, binding: Binding) -> bool:
        """A block runs that was not expected; whether anything is found to have changed.

        Everything is looked through the first time, unless it was when the call began. If it changed after some blocks
        had run, masks are not `usable` for the rest of the call.
        """
        changed = False
        if self._ran is None:
            self._ran = list(self._awaited[: self._place])
            self._awaited, self._place = (END,), 0
            if not self._looked_through:
                changed = self._look_through(whole, binding)
        self._ran.append((graph, binding.number))
        if self._steps is not None:
            self._steps.append(running_step(whole, binding))
        return changed

    def end(self) -> None:
        """The call is over, and was not broken off."""
        if not self._counts:
            return
        ran = self._awaited[: self._place] if self._ran is None else tuple(self._ran)
        if self._order is not None and (*ran, END) == self._order.blocks:
            self._in_order, self._last, self._repeated = True, (), ()
            return
        if self._steps is not None and ran == self._repeated:
            self._judged = ran
            self._learn(ran, self._steps)
        self._repeated = ran if ran == self._last != self._judged else ()
        self._last = ran

    def doubt(self) -> None:
        """The root is called, and nobody follows."""
        self._doubted = True

    def _look_through(self, whole: bool, binding: Binding) -> bool:
        """Whether anything changed since the last call began."""
        self._looked_through = True
        if self._all.unchanged():
            return False
        order, begins = self._order, not self._ran
        assert order is not None
        self._start_over()
        # Unless it is the first block that runs, and only what blocks check changed, old and new have met in this call.
        if not begins or not order.begins_with(running_step(whole, binding)) or not order.rest.unchanged():
            self.usable = False
        return True

    def _start_over(self) -> None:
        module = self._module()
        assert module is not None  # it is being called
        self._all = ModuleContents(module)
        self._looked_through, self._last, self._repeated = True, (), ()
        if self._ran is None:
            self._record()
        self._forget_order()

    def _record(self) -> None:
        self._awaited, self._place, self._ran = (END,), 0, []
        self._steps = [] if self._repeated else None

    def _forget_order(self) -> None:
        self._order, self._judged = None, ()

    def _learn(self, ran: tuple[Ran, ...], steps: list[Step]) -> None:
        """Let this be the order, if its blocks check anything."""
        module = self._module()
        order = None if module is None else learn_order(module, ran, steps)
        # Else something changed in the middle of this call, which the next one will see.
        if order is not None and self._all.unchanged():
            self._order, self._in_order = order, True
