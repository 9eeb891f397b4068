"""Let a graph that stays dense because its sequences are short serve only such: longer ones are compiled anew."""

from __future__ import annotations

from typing import Any, NamedTuple

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StrictMinMaxConstraint, free_symbols


class Below(NamedTuple):
    """A size of a graph, and the limit below which it was when something was decided by it."""

    size: int | torch.SymInt
    limit: int


def serve_only(below: Below) -> None:
    """Let the graph serve only sizes below the limit, by a guard on the size if it is symbolic.

    But not where torch would refuse to compile: where the user has promised it a range of sizes (`mark_dynamic(min=,
    max=)`) or a hint that is not the size, and where one size alone would be left, which torch would take for a
    constant.
    """
    size, limit = below
    if not isinstance(size, torch.SymInt):
        return
    shape_env = size.node.shape_env
    if _is_promised(shape_env) or _leaves_one_size(shape_env, size.node.expr, limit):
        return
    holds = bool(size < limit)  # which torch remembers as a guard
    assert holds, below


def symbols_of(size: int | torch.SymInt) -> set[sympy.Symbol]:
    """The symbols that a size is computed from."""
    return set(free_symbols(size)) if isinstance(size, torch.SymInt) else set()


def _is_promised(shape_env: ShapeEnv) -> bool:
    if getattr(shape_env, "var_to_hint_override", None):
        return True
    contexts = (fake.symbolic_context for fake in shape_env.tracked_fakes or ())
    constraints = (getattr(context, "constraint_sizes", None) or () for context in contexts)
    return any(isinstance(one, StrictMinMaxConstraint) for ones in constraints for one in ones)


def _leaves_one_size(shape_env: ShapeEnv, size: Any, limit: int) -> bool:
    """Whether the next larger value of the symbols of `size` is at the limit or beyond."""
    following = {symbol: shape_env.var_to_range[symbol].lower + 1 for symbol in size.free_symbols}
    return not size.xreplace(following) < limit
