"""Tell text from latents by what becomes of an attention's result, where its operands do not show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from .attention_site import AttentionSite
from .graph_inputs import fake_tensor
from .move_tokens import SPLITS, Part, argument, function_name, moved_tokens, restored_tokens, split_part, subscripted
from .token_roles import Joint, Role, Segment, Size, Tokens, at_most, size_of
from .trace_tokens import TokenTrace

Range = tuple[Size, Size]


def find_later_split(site: AttentionSite, trace: TokenTrace) -> tuple[Range, ...] | None:
    """Ranges of text in the sequence of a site whose result is split later; None if there is nothing to tell them by.

    A part that is added to latents, or that the graph returns, is latents; the rest is text.
    """
    parts = [(part, _becomes(node, trace)) for node, part in _later_parts(site)]
    latents = [part for part, role in parts if role is Role.LATENT]
    text = [part for part, role in parts if role is Role.TEXT]
    if not latents or not all(_within(part, latents[0]) and _within(latents[0], part) for part in latents):
        return None
    _, start, end = latents[0]
    if not all(at_most(part.end, start) or at_most(end, part.start) for part in text):
        return None
    rest: tuple[Range, Range] = ((0, start), (end, size_of(site.q, 2)))
    return tuple((first, last) for first, last in rest if not at_most(last, first)) or None


def _later_parts(site: AttentionSite) -> Iterator[tuple[fx.Node, Part]]:
    """Where the result is taken apart along its tokens, as far as each of them keeps its place until then."""
    start = restored_tokens(site, Joint(2, (Segment(None, size_of(site.q, 2)),), site.node))
    pending = [(site.node, start)] if isinstance(start, Joint) else []
    seen = {site.node}
    while pending:
        source, tokens = pending.pop()
        for user in source.users:
            if user in seen:
                continue
            seen.add(user)
            for result, moved in _results(user, source, tokens):
                if isinstance(moved, Part):
                    yield result, moved
                elif isinstance(moved, Joint):
                    pending.append((result, moved))


def _results(user: fx.Node, source: fx.Node, tokens: Joint) -> Iterator[tuple[fx.Node, Part | Tokens]]:
    """The tensors that a user makes of the result, each with its tokens or with the part of them that it takes."""
    name = function_name(user)
    if name in SPLITS:
        value = fake_tensor(source)
        assert value is not None
        dim = argument(user, 2, "dim", 0) % value.dim()
        for result in user.users:
            index = result.args[1]
            assert isinstance(index, int)
            yield result, split_part(result, user, index, dim) if dim == tokens.dim else tokens
    elif name == "getitem" and user.args[0] is source:
        part = subscripted(user, source, tokens.dim)
        if part is not None:
            whole = part.start == 0 and at_most(size_of(source, tokens.dim), part.end)
            yield user, replace(tokens, dim=part.dim) if whole else part
    elif fake_tensor(user) is not None:
        yield user, moved_tokens(tokens, source, user)


def _becomes(node: fx.Node, trace: TokenTrace) -> Role | None:
    """What the nearest operation that knows takes a part for; what the graph returns is latents."""
    pending, seen = [node], {node}
    for current in pending:
        tokens = trace[current]
        if isinstance(tokens, Role):
            return tokens
        if current.op == "output":
            return Role.LATENT
        users = [user for user in current.users if user not in seen]
        seen.update(users)
        pending += users
    return None


def _within(part: Part, other: Part) -> bool:
    return at_most(other.start, part.start) and at_most(part.end, other.end)
