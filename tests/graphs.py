"""Capture Dynamo graphs without running them, and a toy denoiser whose attention can be bent in every way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lite_compile import Options, Reason, clear_report, report
from lite_compile.backend import protect_tokens, rewrite_graph
from lite_compile.passes.decide_attention import Decline, Rewrite, decide_attention
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_clock_inputs import find_clock_inputs

TOKENS, DIM, HEADS = 64, 32, 2
OPTIONS = Options(min_seq_len=TOKENS)


def capture(
    function: Callable[..., Any],
    *args: Any,
    grad: bool = False,
    dynamic: bool | None = None,
    mark: Callable[[Any], None] = lambda argument: None,
    **kwargs: Any,
) -> fx.GraphModule:
    """The one graph that Dynamo makes of `function(*args, **kwargs)`, of which each of `args` is marked first."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    for argument in args:
        mark(argument)
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


class Attention(nn.Module):
    """Attention of `[B, S, DIM]` tokens; `attend` is what happens between the projections."""

    def __init__(self, attend: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.attend = attend or F.scaled_dot_product_attention

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    """Latents `[B, S, DIM]`, a timestep with its sinusoidal embedding, and a prompt `[B, S, DIM]`."""

    def __init__(self, attend: Callable[..., Tensor] | None = None, cross: bool = False) -> None:
        super().__init__()
        self.attn = Attention(attend)
        self.cross = Attention() if cross else None

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        angles = timestep[:, None].float() * torch.arange(DIM // 2, device=timestep.device)
        x = hidden_states + torch.cat([angles.sin(), angles.cos()], -1)[:, None].to(hidden_states.dtype)
        x = x + self.attn(x)
        return x if self.cross is None else x + self.cross(x, prompt)


def inputs(batch: int = 1, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of a `Denoiser`."""
    shape = (batch, tokens, DIM)
    return torch.ones(shape, dtype=dtype), torch.full((batch,), 500.0), torch.ones(shape, dtype=dtype)


def decide(gm: fx.GraphModule, options: Options = OPTIONS) -> list[Rewrite | Decline]:
    """Decisions about all sites of `gm`."""
    sites = find_attention(gm)
    clock = find_clock_inputs(gm, sites)
    sites = protect_tokens(gm, sites, None if isinstance(clock, str) else clock, options)
    return decide_attention(sites, clock if isinstance(clock, str) else None, options)


def random_inputs(
    batch: int = 1, tokens: int = TOKENS, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of a `Denoiser` that differ from token to token."""
    latents, timestep, prompt = inputs(batch, tokens, dtype)
    noise = torch.Generator().manual_seed(0)
    return torch.randn(latents.shape, generator=noise).to(dtype), timestep, prompt


def run_both(
    model: nn.Module, sites: int = 1, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Outputs of `model` without compilation, and with all its `sites` rewritten and nothing skipped.

    Args:
        kwargs: `batch` and `tokens` of the inputs.
    """
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype).eval()
    latents, timestep, prompt = random_inputs(dtype=dtype, **kwargs)
    torch._dynamo.reset()
    clear_report()
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf}
    with torch.no_grad():
        sparse = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
        outputs = model(latents, timestep, prompt), sparse(latents, timestep, prompt)
    assert [site.rewritten for site in report()] == [True] * sites, str(report())
    return outputs


def assert_left_alone(attend: Callable[..., Tensor], reason: Reason | None) -> None:
    """Attention in this spelling stays dense for this reason (None: it is no site), and its graph is not touched."""
    gm = capture(Denoiser(attend), *inputs(batch=2))
    before = gm.code
    rewritten, state, found = rewrite_graph(gm, OPTIONS)
    assert rewritten is gm
    assert state is None
    assert gm.code == before
    assert [site.reason for site in found.sites] == ([] if reason is None else [reason])
