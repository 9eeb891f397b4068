"""The denoiser that a plan describes, its inputs, and ways to run it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from plans import Plan
from torch import Tensor, nn

DIM = 32
LOCALITY = 4.0
"""How much stronger the place of a token is than what else it holds: distant tiles become negligible."""
EINSUM = {
    "transposed": ("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    "folded": ("bid,bjd->bij", "bij,bjd->bid"),
    "heads_third": ("bihd,bjhd->bhij", "bhij,bjhd->bihd"),
}


class Attention(nn.Module):
    """Attention of `[B, S, DIM]` tokens, written as the plan says."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.sizes = [heads * plan.head_dim for heads in (plan.heads, plan.kv_heads, plan.kv_heads)]
        separate = plan.projections == "separate"
        self.to_qkv = nn.ModuleList(nn.Linear(DIM, size) for size in (self.sizes if separate else [sum(self.sizes)]))
        self.to_text_qkv = copy.deepcopy(self.to_qkv) if plan.tokens_of == "two_projections" else None
        self.to_out = nn.Linear(self.sizes[0], DIM)
        self.scale = plan.head_dim**-0.5
        self.wide = torch.promote_types(dtype_of(plan), torch.float32)

    def forward(self, x: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        plan = self.plan
        q, k, v = self.project(self.to_qkv, x, text if plan.tokens_of == "cross" else x)
        if self.to_text_qkv is not None:
            of_text = self.project(self.to_text_qkv, text, text)
            q, k, v = (torch.cat(both, 1) for both in zip((q, k, v), of_text, strict=True))
        q, k, v = self.arrange(q), self.arrange(self.repeat(k)), self.arrange(self.repeat(v))
        if plan.written == "q_before":
            q.mul_(1.25)
        attend = self.attend_by_hand if plan.hand_written else self.attend_by_function
        out = attend(q, k, v, self.mask(keep, x.shape[1] if plan.tokens_of == "cross" else keep.shape[1]))
        if plan.written == "q_after":
            q.mul_(1.25)
        if plan.written == "output":
            out.mul_(1.25)
        used = {"q": q, "k": k, "v": v, "output": out}.get(plan.used)
        out = self.to_out(self.merge(out, x.shape[0]))
        return out if used is None else out + used.mean()

    def project(self, layers: nn.ModuleList, x: Tensor, context: Tensor) -> list[Tensor]:
        """q, k and v as `[B, S, H, D]`."""
        plan = self.plan
        if plan.projections == "separate":
            parts = [layer(source) for layer, source in zip(layers, (x, context, context), strict=True)]
        elif plan.projections == "split":
            parts = list(layers[0](x).split(self.sizes, -1))
        elif plan.projections == "chunk":
            parts = list(layers[0](x).chunk(3, -1))
        else:
            stacked = layers[0](x).reshape(x.shape[0], -1, 3, plan.heads, plan.head_dim)
            return list(stacked.permute(2, 0, 1, 3, 4).unbind(0))
        return [part.unflatten(-1, (-1, plan.head_dim)) for part in parts]

    def repeat(self, x: Tensor) -> Tensor:
        """k or v `[B, S, Hkv, D]` with as many heads as q, unless attention itself shares them."""
        plan = self.plan
        times = plan.heads // plan.kv_heads
        if times == 1 or plan.product == "sdpa_gqa" or plan.repeat == "broadcast":
            return x
        if plan.repeat == "interleave":
            return x.repeat_interleave(times, dim=2)
        return x[:, :, :, None].expand(-1, -1, -1, times, -1).reshape(*x.shape[:2], plan.heads, plan.head_dim)

    def arrange(self, x: Tensor) -> Tensor:
        """`[B, S, H, D]` as the layout has it."""
        layout = self.plan.layout
        if layout == "heads_third":
            return x
        if layout == "permuted":
            return x.permute(0, 2, 1, 3)
        x = x.transpose(1, 2)
        if layout == "folded":
            return x.reshape(-1, *x.shape[2:])
        return x.contiguous() if layout == "contiguous" else x

    def merge(self, out: Tensor, batch: int) -> Tensor:
        """The result as `[B, S, H * D]`."""
        if self.plan.layout == "folded":
            out = out.unflatten(0, (batch, -1))
        return (out if self.plan.layout == "heads_third" else out.transpose(1, 2)).flatten(2)

    def mask(self, keep: Tensor, q_len: int) -> Tensor | None:
        """The plan's mask, True where attention may look, made of `keep` `[B, Sk]`; or what is added to the scores."""
        plan = self.plan
        batch, k_len = keep.shape
        keys = keep[:, None, None]
        if plan.mask in ("none", "is_causal"):
            return None
        if plan.mask in ("zeros", "filled"):
            mask = torch.zeros(q_len, k_len, dtype=dtype_of(plan), device=keep.device)
            if plan.mask == "filled":
                mask[:, 1:3] = -torch.inf
        elif plan.mask == "causal":
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=keep.device).tril()
        elif plan.mask == "rows":
            mask = keys | torch.eye(q_len, k_len, dtype=torch.bool, device=keep.device)
        elif plan.mask == "heads":
            mask = keys | (torch.arange(plan.heads, device=keep.device) % 2 == 0)[:, None, None]
        elif plan.mask == "keys_of_all":
            mask = keep[:1]
        else:
            mask = keys.expand(-1, -1, q_len, -1) if plan.mask == "keys_expanded" else keys
        if plan.layout == "folded":
            mask = mask.expand(batch, plan.heads, -1, k_len).flatten(0, 1)
        if mask.dtype is torch.bool and plan.mask_kind in ("large", "infinite"):
            hidden = torch.zeros_like(mask, dtype=dtype_of(plan))
            return hidden.masked_fill(~mask, -1e4 if plan.mask_kind == "large" else -torch.inf)
        return mask

    def scaled(self, x: Tensor, on: str) -> Tensor:
        """`x` with its part of the scale: `x` is q, k or the scores."""
        if self.plan.scale_on not in (on, "both" if on in ("q", "k") else on):
            return x
        factor = self.scale**0.5 if self.plan.scale_on == "both" else self.scale
        return x / (1 / factor) if self.plan.divide else x * factor

    def attend_by_function(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        plan = self.plan
        dropout = plan.dropout if self.training else 0.0
        causal = plan.mask == "is_causal"
        scale = {"scores": self.scale, "nothing": None}.get(plan.scale_on, 1.0)
        q, k = self.scaled(q, "q"), self.scaled(k, "k")
        if plan.product == "sdpa_by_keyword":
            return F.scaled_dot_product_attention(
                value=v, key=k, query=q, attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scale
            )
        gqa = plan.product == "sdpa_gqa"
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)

    def attend_by_hand(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        plan = self.plan
        given_q, given_v = q, v
        if plan.upcast in ("q_and_k", "everything"):
            q, k = q.to(self.wide), k.to(self.wide)
        if plan.upcast == "everything":
            v = v.to(self.wide)
        product = self.multiply_q_and_k(self.scaled(q, "q"), self.scaled(k, "k"))
        scores = product
        if plan.written == "scores":
            scores = scores.mul_(0.75)
        if plan.written == "scores_by_statement":
            scores.mul_(0.75)
        if mask is not None and plan.mask_first:
            scores = self.hide(scores, mask)
        if plan.product != "baddbmm":  # which scales
            scores = self.scaled(scores, "scores")
        if plan.upcast == "scores":
            scores = scores.to(self.wide)
        if mask is not None and not plan.mask_first:
            scores = self.hide(scores, mask)
        weights = scores.softmax(-1, dtype=self.wide) if plan.upcast == "argument" else F.softmax(scores, dim=-1)
        weights = weights.to(v.dtype)
        used = {"scores": product, "weights": weights}.get(plan.used)
        if plan.written == "q_meanwhile":
            given_q.mul_(0.5)
        if plan.written == "v_meanwhile":
            given_v.mul_(0.5)
        out = self.multiply_by_v(F.dropout(weights, plan.dropout, training=self.training), v).to(given_v.dtype)
        return out if used is None else out + used.mean().to(out.dtype)

    def multiply_q_and_k(self, q: Tensor, k: Tensor) -> Tensor:
        plan = self.plan
        if plan.product == "einsum":
            return torch.einsum(EINSUM[plan.layout][0], q, k)
        if plan.product == "matmul":
            return torch.matmul(q, k.transpose(-1, -2))
        if plan.product == "bmm":
            return torch.bmm(q, k.transpose(1, 2))
        if plan.product == "baddbmm":
            ignored = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
            alpha = self.scale if plan.scale_on == "scores" else 1
            return torch.baddbmm(ignored, q, k.transpose(-1, -2), beta=0, alpha=alpha)
        return q @ k.mT

    def multiply_by_v(self, weights: Tensor, v: Tensor) -> Tensor:
        plan = self.plan
        if plan.product == "einsum":
            return torch.einsum(EINSUM[plan.layout][1], weights, v)
        return torch.bmm(weights, v) if plan.product in ("bmm", "baddbmm") else weights @ v

    def hide(self, scores: Tensor, mask: Tensor) -> Tensor:
        if mask.dtype is not torch.bool:
            return scores + mask
        if self.plan.mask_kind == "where":
            return torch.where(mask, scores, torch.finfo(scores.dtype).min)
        return scores.masked_fill(~mask, -torch.inf)


class Denoiser(nn.Module):
    """Latents, timestep, text and keys to keep, by the names that diffusers gives them."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.blocks = nn.ModuleList(Attention(plan) for _ in range(plan.layers))
        self.proj_out = nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, keep: Tensor) -> Tensor:
        joined = self.plan.tokens_of
        latents = hidden_states.shape[1]
        places = LOCALITY * waves(torch.arange(latents, device=timestep.device), 2 * latents)
        x = hidden_states + places.to(hidden_states.dtype)
        x = x + waves(timestep, 1000)[:, None].to(x.dtype)
        text = encoder_hidden_states
        if joined == "text_first":
            x = torch.cat([text, x], 1)
        elif joined == "text_last":
            x = torch.cat([x, text], 1)
        for block in self.blocks:
            out = block(F.layer_norm(x, (DIM,)), text, keep)
            x = x + out[:, : x.shape[1]]
            if joined == "two_projections":
                text = text + out[:, latents:]
        return self.proj_out(x[:, -latents:] if joined == "text_first" else x[:, :latents])


def waves(positions: Tensor, period: int) -> Tensor:
    """`[N, DIM]`: sines and cosines of `[N]`, the slowest of which has this period."""
    frequencies = 2 * torch.pi / period * torch.arange(1, DIM // 2 + 1, device=positions.device)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def dtype_of(plan: Plan) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype


def build(plan: Plan) -> Denoiser:
    """The plan's model with random weights; each k is like its q, which makes attention local."""
    torch.manual_seed(0)
    model = Denoiser(plan)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    for block in model.blocks:
        for layers in filter(None, (block.to_qkv, block.to_text_qkv)):
            copy_q_to_k(layers, plan)
    return model.to(dtype_of(plan)).train(plan.training)


def copy_q_to_k(layers: nn.ModuleList, plan: Plan) -> None:
    """Let each head of k be projected like the first head of q that uses it."""
    q, k = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim
    heads = torch.cat([layer.weight.detach() for layer in layers])[:q].unflatten(0, (plan.heads, -1))
    used = heads[:: plan.heads // plan.kv_heads].flatten(0, 1)
    with torch.no_grad():
        if plan.projections == "separate":
            layers[1].weight.copy_(used)
        else:
            layers[0].weight[q : q + k] = used


def exactly(plan: Plan, model: Denoiser) -> Denoiser:
    """The same model in float64."""
    exact = Denoiser(dataclasses.replace(plan, dtype="float64", autocast=None))
    exact.load_state_dict(model.state_dict())
    return exact.double().train(plan.training)


def make_inputs(plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the plan's model."""
    noise = torch.Generator().manual_seed(seed)
    keep = torch.rand(plan.batch, plan.k_len, generator=noise) > 0.4
    keep[:, 0] = True  # what a row without any key gives is not defined
    return {
        "hidden_states": torch.randn(plan.batch, plan.tokens, DIM, generator=noise).to(dtype_of(plan)),
        "timestep": torch.full((plan.batch,), 900.0),
        "encoder_hidden_states": torch.randn(plan.batch, plan.text_tokens, DIM, generator=noise).to(dtype_of(plan)),
        "keep": keep,
    }


def call(plan: Plan, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """One call under the plan's autocast; dropout drops the same each time."""
    torch.manual_seed(1)
    dtype = None if plan.autocast is None else getattr(torch, plan.autocast)
    with torch.no_grad(), nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        result: Tensor = model(**inputs)
    return result


def generate(plan: Plan, model: Callable[..., Any], seed: int, steps: int = 2) -> Tensor:
    """Latents after a few steps of two streams each, which differ in their text and in the keys they keep."""
    streams = [make_inputs(plan, 2 * seed + stream) for stream in range(2)]
    latents = streams[0]["hidden_states"]
    for step in range(steps):
        now = {"hidden_states": latents, "timestep": torch.full((plan.batch,), 900.0 - 200.0 * step)}
        first, second = (call(plan, model, {**stream, **now}) for stream in streams)
        latents = latents + (0.05 * (1.5 * first - 0.5 * second)).to(latents.dtype)
    return latents
