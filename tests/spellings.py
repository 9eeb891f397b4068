"""Attention of `[B, H, S, D]` written by hand in many ways, and what looks alike and is something else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lite_compile import Reason

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fold(x: Tensor) -> Tensor:
    """`[B, H, S, D]` to `[B * H, S, D]`."""
    return x.reshape(-1, *x.shape[2:])


def folded(attend: Attend) -> Attend:
    """Heads folded into the batch, the way old diffusers processors do it."""
    return lambda q, k, v: attend(fold(q), fold(k), fold(v)).reshape(q.shape)


def heads_third(attend: Attend) -> Attend:
    """`attend` gets and gives `[B, S, H, D]`."""
    return lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    return torch.bmm(torch.baddbmm(scores, q, k.transpose(-1, -2), beta=0, alpha=0.25).softmax(-1), v)


def baddbmm_of_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    zeros = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    return torch.baddbmm(zeros, q, k.mT, alpha=0.25).softmax(-1).bmm(v)


def timm_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * q.shape[-1] ** -0.5
    attn = q @ k.transpose(-2, -1)
    attn = F.dropout(attn.softmax(dim=-1), 0.1, training=False)
    return attn @ v


def zero_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)
    return ((q @ k.mT) * 0.25 + bias).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(0.25)
    scores /= 2.0
    return (scores * 2).softmax(-1) @ v


def unfolded_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores are folded for the products and unfolded in between."""
    batch, heads, length, _ = q.shape
    scores = torch.bmm(fold(q), fold(k).transpose(1, 2)).view(batch, heads, length, length) * 0.25
    weights = scores.float().softmax(-1).to(q.dtype).view(batch * heads, length, length)
    return torch.bmm(weights, fold(v)).view(q.shape)


def upcast_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computed in float32 whatever comes in."""
    return (((q.float() * 0.25) @ k.float().mT).softmax(-1) @ v.float()).to(q.dtype)


HAND_WRITTEN: dict[str, Attend] = {
    "matmul": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.25, dim=-1), v),
    "operator": lambda q, k, v: ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v,
    "method": lambda q, k, v: q.matmul(k.transpose(2, 3)).mul(0.25).softmax(dim=3).matmul(v),
    "mT": lambda q, k, v: F.softmax(q @ k.mT * 0.25, dim=-1) @ v,
    "permuted_k": lambda q, k, v: F.softmax(0.25 * (q @ k.permute(0, 1, 3, 2)), -1) @ v,
    "contiguous_k": lambda q, k, v: (q @ k.transpose(-1, -2).contiguous() * 0.25).softmax(-1) @ v,
    "no_scale": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "scale_on_q": lambda q, k, v: ((q * 0.25) @ k.mT).softmax(-1) @ v,
    "scale_on_k": lambda q, k, v: (q @ (k * 0.25).mT).softmax(-1) @ v,
    "scale_on_transposed_k": lambda q, k, v: (q @ (k.mT / 4.0)).softmax(-1) @ v,
    "scale_on_both": lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v,
    "scale_everywhere": lambda q, k, v: (((q / 2) @ (2 * k).mT).div(4)).softmax(-1) @ v,
    "in_place": in_place,
    "upcast_softmax": lambda q, k, v: (q @ k.mT * 0.25).float().softmax(-1).to(v.dtype) @ v,
    "upcast_by_argument": lambda q, k, v: F.softmax(q @ k.mT * 0.25, -1, dtype=torch.float32).type_as(v) @ v,
    "upcast_all": upcast_all,
    "aten_softmax": lambda q, k, v: torch.ops.aten._softmax(q @ k.mT * 0.25, -1, False) @ v,
    "dropout_off": lambda q, k, v: F.dropout((q @ k.mT * 0.25).softmax(-1), 0.1, training=False) @ v,
    "dropout_zero": lambda q, k, v: torch.dropout((q @ k.mT * 0.25).softmax(-1), 0.0, True) @ v,
    "dropout_by_keyword": lambda q, k, v: torch.dropout((q @ k.mT * 0.25).softmax(-1), p=0.1, train=False) @ v,
    "timm": timm_attention,
    "zero_mask": zero_mask,
    "zero_mask_viewed": lambda q, k, v: (
        q @ k.mT * 0.25 + torch.zeros(1, k.shape[-2], device=q.device).to(q.dtype)[None, None].expand(1, 1, 1, -1)
    ).softmax(-1) @ v,
    "zero_number": lambda q, k, v: (q @ k.mT * 0.25 + 0.0).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25).softmax(-1), v
    ),
    "einsum_ellipsis": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id", (torch.einsum("...id,...jd->...ij", q, k) * 0.25).softmax(-1), v
    ),
    "einsum_swapped": lambda q, k, v: torch.einsum(
        "bhjd,bhij->bhid", v, (torch.einsum("bhjd,bhid->bhij", k, q) * 0.25).softmax(-1)
    ),
    "einsum_heads_third": heads_third(
        lambda q, k, v: torch.einsum(
            "bhij,bjhd->bihd", (torch.einsum("bihd,bjhd->bhij", q, k) * 0.25).softmax(-1), v
        )
    ),
    "einsum_scores_by_query": heads_third(
        lambda q, k, v: torch.einsum(
            "bihj,bjhd->bihd", (torch.einsum("bihd,bjhd->bihj", q, k) * 0.25).softmax(-1), v
        )
    ),
    "einsum_then_matmul": lambda q, k, v: (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25).softmax(-1) @ v,
    "bmm": folded(lambda q, k, v: torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.25).softmax(-1), v)),
    "baddbmm": folded(baddbmm),
    "baddbmm_of_zeros": folded(baddbmm_of_zeros),
    "unfolded_scores": unfolded_scores,
    "one_head_for_all": lambda q, k, v: (q @ k[:, :1].mT * 0.25).softmax(-1) @ v[:, :1],
}  # fmt: skip
"""Every one of them has to be found and rewritten."""


def returned_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    return weights @ v + weights.mean()


def shared_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v + scores.amax()


def shared_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores * 0.25).softmax(-1) @ v + scores.amax()


def shared_dropped_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout((q @ k.mT * 0.25).softmax(-1), 0.0)
    return weights @ v + weights @ v.flip(2)


def scores_changed_by_statement(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mul_(0.25)
    return scores.softmax(-1) @ v


def query_changed_meanwhile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    weights = (q @ k.mT * 0.25).softmax(-1)
    q.add_(1.0)
    return weights @ v + q.mean()


def unscaled_query_changed_meanwhile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scaled = q * 0.25
    q[:, :, 0] = 1.0
    return (scaled @ k.mT).softmax(-1) @ v + q.mean()


def bias_filled_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)
    bias[:, :7] = -10.0
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def bias_filled_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)
    bias[:, :7].fill_(-10.0)
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def bias_filled_after_a_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(q.shape[-2], k.shape[-2], device=q.device)
    same = bias.float()
    same.unsqueeze(0).masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu(1), -10.0)
    return (q @ k.mT * 0.25 + bias.to(q.dtype)).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT * 0.25).masked_fill(future, -math.inf).softmax(-1) @ v


def where_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    condition = torch.ones((), dtype=torch.bool, device=q.device)
    return torch.where(condition, q @ k.mT * 0.25, -1e4).softmax(-1) @ v


def baddbmm_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device).tril()
    return torch.baddbmm(bias, q, k.mT, alpha=0.25).softmax(-1) @ v


def normalised_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.25).softmax(-1)
    return (weights / weights.sum(-2, keepdim=True)) @ v


LOOK_ALIKES: dict[str, tuple[Attend, Reason | None]] = {
    "weights_averaged": (returned_weights, Reason.SHARED),
    "scores_used": (shared_scores, Reason.SHARED),
    "product_used": (shared_product, Reason.SHARED),
    "weights_used_twice": (shared_dropped_weights, Reason.SHARED),
    "scores_changed_by_statement": (scores_changed_by_statement, Reason.SHARED),
    "query_changed_meanwhile": (query_changed_meanwhile, Reason.VARIANT),
    "unscaled_query_changed_meanwhile": (unscaled_query_changed_meanwhile, Reason.VARIANT),
    "bias": (lambda q, k, v: (q @ k.mT * 0.25 + k.mean(-1)[:, :, None]).softmax(-1) @ v, Reason.MASK),
    "bias_filled_later": (bias_filled_later, Reason.MASK),
    "bias_filled_through_a_view": (bias_filled_through_a_view, Reason.MASK),
    "bias_filled_after_a_cast": (bias_filled_after_a_cast, Reason.MASK),
    "baddbmm_with_bias": (folded(baddbmm_with_bias), Reason.MASK),
    "causal": (causal, Reason.MASK),
    "where": (where_mask, Reason.MASK),
    "number_added_to_some": (
        lambda q, k, v: ((q @ k.mT) + torch.arange(k.shape[-2], device=q.device)).softmax(-1) @ v, Reason.MASK,
    ),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT * 0.25).softmax(-1), 0.1) @ v, Reason.DROPOUT),
    "dropout_by_keyword": (
        lambda q, k, v: torch.dropout((q @ k.mT * 0.25).softmax(-1), p=0.1, train=True) @ v, Reason.DROPOUT,
    ),
    "tensor_scale": (lambda q, k, v: (q @ k.mT * v.mean()).softmax(-1) @ v, Reason.SCALE),
    "scale_per_head": (lambda q, k, v: (q @ k.mT * v.mean((0, 2, 3))[:, None, None]).softmax(-1) @ v, Reason.VARIANT),
    "maximum_subtracted": (
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-1, keepdim=True)).softmax(-1) @ v, Reason.VARIANT,
    ),
    "floor_division": (lambda q, k, v: ((q @ k.mT) // 4).softmax(-1) @ v, Reason.VARIANT),
    "division_by_zero": (lambda q, k, v: ((q @ k.mT) / 0).softmax(-1) @ v, Reason.VARIANT),
    "tanh": (lambda q, k, v: (q @ k.mT * 0.25).tanh().mul(5.0).softmax(-1) @ v, Reason.VARIANT),
    "softmax_twice": (lambda q, k, v: (q @ k.mT * 0.25).softmax(-1).softmax(-1) @ v, Reason.VARIANT),
    "result_scaled": (
        folded(lambda q, k, v: torch.baddbmm(v, (q @ k.mT).softmax(-1), v, alpha=0.5)), Reason.VARIANT,
    ),
    "shared_k": (
        lambda q, k, v: torch.einsum("bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v[:, 0]),
        Reason.GQA,
    ),
    "fewer_keys": (lambda q, k, v: (q @ k[:, :, 1:].mT * 0.25).softmax(-1) @ v[:, :, 1:], Reason.CROSS_ATTENTION),
    "narrower_v": (
        lambda q, k, v: ((q @ k.mT).softmax(-1).bfloat16() @ v.bfloat16()).to(v.dtype) + 0 * v, Reason.DTYPE,
    ),
    "float64_v": (lambda q, k, v: ((q @ k.mT).softmax(-1).double() @ v.double()).to(v.dtype), None),
    "float64_scores": (lambda q, k, v: (q @ k.mT).double().softmax(-1).to(v.dtype) @ v, None),
    "other_dim": (lambda q, k, v: (q @ k.mT * 0.25).softmax(-2) @ v, None),
    "over_heads": (lambda q, k, v: (q @ k.mT * 0.25).softmax(1) @ v, None),
    "normalised_twice": (normalised_twice, None),
    "transposed_weights": (lambda q, k, v: (q @ k.mT * 0.25).softmax(-1).mT @ v, None),
    "summed_over_heads": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bid", (q @ k.mT * 0.25).softmax(-1), v)[:, None] + q, None,
    ),
    "k_across": (
        lambda q, k, v: ((q[..., :16, :] @ k[..., :16, :]).softmax(-1) @ v[..., :16, :]).repeat(1, 1, 4, 1),
        Reason.SHORT,
    ),
    "two_weights": (lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ w @ v, None),
    "linear_attention": (lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), None),
    "codebook": (
        lambda q, k, v: torch.einsum("bhnk,kd->bhnd", torch.einsum("bhnd,kd->bhnk", q, k[0, 0]).softmax(-1), v[0, 0]),
        None,
    ),
    "attention_sink": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v, None,
    ),
    "some_weights": (lambda q, k, v: (q @ k.mT).softmax(-1)[..., :32] @ v[:, :, :32], None),
    "sigmoid": (lambda q, k, v: (q @ k.mT * 0.25).sigmoid() @ v, None),
}  # fmt: skip
"""None of them may be rewritten; the reason, or None if it is no site at all."""
