"""Find the text tokens of joint attention, whose tiles have to be computed always."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from ..decisions import Reason
from ..ops import MAX_PROTECTED
from .attention_site import AttentionSite, Declined, Protection
from .find_attention import module_path
from .find_clock_inputs import LATENT_NAMES
from .find_later_split import find_later_split
from .graph_inputs import fake_tensor, is_static, placeholders, source_name
from .move_tokens import function_name
from .planned_nodes import Operand
from .token_roles import Joint, Lost, Role, Size, Tokens, add, same_tokens
from .trace_tokens import TokenTrace

_TEXT_NAME = re.compile(r"encoder_hidden_states|text|txt|prompt|context|caption|cap_feats|llm|t5|clip")
_NO_TOKENS = re.compile(r"mask|_ids|_len|lens|pooled|rotary|rope|freqs|position")
_TOKENS_DIM = 2
_REMEDY = "say where it lies with options={'protect': [(start, end)]}, or that there is none with 'protect': []"


def find_joint_tokens(
    gm: fx.GraphModule, sites: Sequence[AttentionSite], latents: fx.Node | None
) -> list[AttentionSite]:
    """The sites with their `protection`. The graph is not changed.

    Args:
        latents: the input that the clock reads as such, if there is one. Other inputs are known by name or shape.
    """
    inputs = {node: role for node in placeholders(gm.graph) if (role := input_role(node, latents)) is not None}
    trace = TokenTrace(gm.graph, sites, inputs)
    predicted = [tokens for node in gm.graph.output_node().all_input_nodes if (tokens := trace[node]) is not None]
    return [replace(site, protection=_protection(site, trace, predicted)) for site in sites]


def input_role(node: fx.Node, latents: fx.Node | None) -> Role | None:
    """What the tokens of a graph input stand for; None if it has none."""
    value, name = fake_tensor(node), _argument(node)
    if is_static(node) or value is None or value.dim() < 2 or value.is_complex():
        return None
    if name in LATENT_NAMES or "latent" in name:
        return Role.LATENT
    if _NO_TOKENS.search(name):
        return None
    if _TEXT_NAME.search(name):
        return Role.TEXT
    if node is latents:
        return Role.LATENT
    if not value.is_floating_point() or value.dim() == 2:
        return None
    return Role.OTHER if value.dim() == 3 else Role.LATENT


def _argument(node: fx.Node) -> str:
    """Name of the argument that an input is, or that is a list or dictionary in which the input lies."""
    names = re.findall(r"\['([A-Za-z_]\w*)'\]", source_name(node))
    return names[-1] if names else ""


def _protection(site: AttentionSite, trace: TokenTrace, predicted: Sequence[Tokens]) -> Protection | Declined:
    queries = fake_tensor(site.q)
    if site.declined is not None or queries is None or queries.dim() != 4:
        return Protection()
    q, k = trace[site.q], trace[site.k]
    if q is Role.TEXT and k in (Role.TEXT, None):
        return Declined(Reason.TEXT)
    if not isinstance(q, Joint | Lost) and not isinstance(k, Joint | Lost):
        return Protection()
    lost = next((tokens for tokens in (q, k) if isinstance(tokens, Lost)), None)
    if lost is not None:
        split = find_later_split(site, trace)
        if split is not None:
            return Protection(split, "text: split after the attention")
        return Declined(Reason.JOINT, f"it cannot be followed through {_describe(lost.at)}; {_REMEDY}")
    if not isinstance(q, Joint) or not same_tokens(q, k) or q.dim != _TOKENS_DIM:
        return Declined(Reason.JOINT, f"q and k do not hold the same tokens in the same places; {_REMEDY}")
    # What the model leaves out of its result after the attention is no latents either.
    conditions = {Role.TEXT, Role.OTHER} if set(predicted) == {Role.LATENT} else {Role.TEXT}
    ranges = _ranges(q, conditions)
    if not ranges:
        return Declined(Reason.JOINT, f"{_describe(q.cat)} joins latents and an input that may be text; {_REMEDY}")
    if len(ranges) > MAX_PROTECTED:
        return Declined(Reason.JOINT, f"it lies in {len(ranges)} places, {MAX_PROTECTED} are supported; {_REMEDY}")
    return Protection(ranges, f"text: {_describe(q.cat)}")


def _ranges(joint: Joint, roles: set[Role]) -> tuple[tuple[Size, Size], ...]:
    ranges: list[tuple[Size, Size]] = []
    start: Size = 0
    for segment in joint.segments:
        end = add(start, segment.size)
        if segment.role in roles:
            before = ranges.pop() if ranges and ranges[-1][1] == start else (start, start)
            ranges.append((before[0], end))
        start = end
    return tuple(ranges)


def _describe(node: Operand) -> str:
    """What a node does, and where in the model: `cat in blocks.0.attn1`."""
    path = ".".join(module_path(node)[1:]) if isinstance(node, fx.Node) else ""
    return f"{function_name(node)} in {path or 'the model'}"
