"""Take k and v from before their heads were repeated for those of q: the op reads shared heads where they are."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .attention_site import AttentionSite
from .graph_inputs import fake_tensor
from .planned_nodes import Operand, plan
from .trace_operand import permutation_of
from .writes import written_meanwhile

_INTERLEAVE = {"repeat_interleave", torch.repeat_interleave}
_COPIES = {"contiguous", "clone", torch.clone}
_MERGES = {"reshape", "view", "flatten", torch.reshape, torch.flatten}
_REPEATS = {"expand", "repeat"}


class _Shared(NamedTuple):
    """What was repeated, and the nodes that did it."""

    operand: Operand
    passed: tuple[fx.Node, ...] = ()


def share_heads(site: AttentionSite) -> AttentionSite:
    """The site with as many heads in k and v as there are different ones, or as it is."""
    k, v = _before_repetition(site.k, 1), _before_repetition(site.v, 1)
    if k is None or v is None or not _agree(k.operand, v.operand, 1, 1):
        return site
    passed = (*k.passed, *v.passed)
    if written_meanwhile(passed, site.node) is not None:
        return site
    return dataclasses.replace(site, k=k.operand, v=v.operand, enable_gqa=True, copies=tuple(dict.fromkeys(passed)))


def _before_repetition(x: Any, dim: int) -> _Shared | None:
    """`[B, Hkv, Sk, D]` whose heads are each repeated in `x` `[B, H, Sk, D]`, heads being dimension `dim`."""
    fake = fake_tensor(x)
    if fake is None or fake.dim() != 4:
        return None
    passed = (x,) if isinstance(x, fx.Node) else ()
    permutation = permutation_of(x)
    if permutation is not None:
        found = _before_repetition(x.args[0], permutation[dim])
        return found and _Shared(plan("permute", found.operand, *permutation), (*passed, *found.passed))
    if x.target in _COPIES:
        found = _before_repetition(x.args[0], dim)
        return found and _Shared(found.operand, (*passed, *found.passed))
    if x.target in _INTERLEAVE:
        times, along = (*x.args[1:], *x.kwargs.values(), None)[:2]
        alone = set(x.kwargs) <= {"repeats", "dim"} and isinstance(times, int) and isinstance(along, int)
        return _Shared(x.args[0], passed) if alone and along % 4 == dim else None
    if x.target in _MERGES:
        return _before_merge(x, dim, passed)
    return None


def _before_merge(x: Operand, dim: int, passed: tuple[fx.Node, ...]) -> _Shared | None:
    """The same for `[..., Hkv, 1, ...]`, expanded or repeated to `[..., Hkv, n, ...]` and merged to `[..., H, ...]`."""
    repeated: Any = x.args[0]
    if getattr(repeated, "target", None) not in _REPEATS:
        return None
    one = repeated.args[0]
    single, many = fake_tensor(one), fake_tensor(repeated)
    if single is None or many is None or single.dim() != 5 or many.dim() != 5:
        return None
    others = [d for d in range(5) if d != dim + 1]
    if not statically_known_true(single.shape[dim + 1] == 1):
        return None
    if not all(statically_known_true(single.shape[d] == many.shape[d]) for d in others):
        return None
    if not all(_agree(x, repeated, d, d if d < dim else d + 1) for d in range(4) if d != dim):
        return None
    return _Shared(plan("squeeze", one, dim + 1), (*passed, repeated))


def _agree(left: Operand, right: Operand, left_dim: int, right_dim: int) -> bool:
    a, b = fake_tensor(left), fake_tensor(right)
    return a is not None and b is not None and statically_known_true(a.shape[left_dim] == b.shape[right_dim])
