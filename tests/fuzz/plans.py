"""Descriptions of random denoisers, and what about each of them may keep its attention dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from lite_compile import Reason

MIN_SEQ_LEN = 32
"""Option of that name under which the plans are compiled: the shortest lengths lie below."""
SDPA = ("sdpa", "sdpa_by_keyword", "sdpa_gqa")
WRITTEN = ("operator", "matmul", "bmm", "baddbmm", "einsum")
OVER_KEYS = ("none", "zeros", "keys", "keys_expanded", "keys_of_all")
"""Masks that are the same for all heads and queries."""


@dataclass(frozen=True)
class Plan:
    """A denoiser with attention written in one way. `build` makes the same model of what is printed."""

    product: str = "sdpa"
    """One of `SDPA`, or what the two products of hand-written attention are: one of `WRITTEN`."""
    layout: str = "transposed"
    """transposed, permuted or contiguous `[B, H, S, D]`; folded `[B * H, S, D]`; heads_third `[B, S, H, D]`."""
    projections: str = "separate"
    """Of q, k and v: separate, or stacked in one and taken apart by chunk, split or unbind."""
    tokens_of: str = "self"
    """self, cross; text and latents in one sequence: text_first, text_last, two_projections."""
    batch: int = 1
    tokens: int = 64
    text_tokens: int = 5
    layers: int = 1
    heads: int = 2
    kv_heads: int = 2
    repeat: str = "interleave"
    """How k and v get as many heads as q: interleave, expand; broadcast (from one)."""
    head_dim: int = 16
    dtype: str = "float32"
    autocast: str | None = None
    scale_on: str = "scores"
    """nothing, q, k, both, scores."""
    divide: bool = False
    """Whether scales divide."""
    upcast: str = "nothing"
    """nothing, scores, argument (of softmax), q_and_k, everything."""
    mask: str = "none"
    """One of `OVER_KEYS`; filled (in place); rows, heads, causal; is_causal (the argument)."""
    mask_kind: str = "bool"
    """bool (`masked_fill` where hand-written), where, large (-1e4 is added), infinite (-inf is added)."""
    mask_first: bool = False
    """Whether hand-written attention masks the scores before it scales them."""
    dropout: float = 0.0
    training: bool = False
    used: str = "nothing"
    """What else becomes of q, k, v, scores, weights or output."""
    written: str = "nothing"
    """What is changed in place: q_before, q_meanwhile, v_meanwhile, q_after, scores, scores_by_statement, output."""
    dynamic: bool | None = None

    @property
    def hand_written(self) -> bool:
        return self.product in WRITTEN

    @property
    def q_len(self) -> int:
        return self.tokens + (self.text_tokens if self.tokens_of not in ("self", "cross") else 0)

    @property
    def k_len(self) -> int:
        return self.text_tokens if self.tokens_of == "cross" else self.q_len


def allowed_decisions(plan: Plan) -> set[Reason | None]:
    """The reasons that the plan gives to leave its attention dense; None, to rewrite it, if none of them is cogent."""
    cogent = {
        Reason.CROSS_ATTENTION: plan.tokens_of == "cross",
        Reason.SHORT: plan.q_len < MIN_SEQ_LEN,
        Reason.HEAD_DIM: plan.head_dim < 16,
        Reason.CAUSAL: plan.mask == "is_causal",
        Reason.DROPOUT: plan.training and plan.dropout > 0,
        Reason.SHARED: plan.used in ("scores", "weights") or plan.written == "scores_by_statement",
        Reason.MASK: plan.mask in ("rows", "causal") or (plan.mask == "heads" and plan.heads > 1),
        Reason.VARIANT: plan.hand_written and plan.written == "q_meanwhile",
        Reason.RANK: not plan.hand_written and plan.layout == "folded",
    }
    cautious = {
        # A write to anything may be one to what q, k or v was computed from.
        Reason.VARIANT: plan.hand_written and (plan.written in ("q_before", "v_meanwhile") or plan.mask == "filled"),
        # Whether masks of heads in the batch, or rows that were written to, are alike is not seen.
        Reason.MASK: plan.mask == "filled" or (plan.layout == "folded" and plan.mask != "none"),
        # A scale that is a symbol stays where it is, and so does the upcast above it.
        Reason.DTYPE: plan.dynamic is True and plan.upcast == "q_and_k" and plan.scale_on in ("q", "k", "both"),
    }
    dense = {reason for reason, holds in cogent.items() if holds}
    return dense | {reason for reason, holds in cautious.items() if holds} | (set() if dense else {None})


def _mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    """The usual value in about three of four plans: were all choices free, hardly any plan would be rewritten."""
    return st.sampled_from((usual,) * 3 * len(others) + others)


@st.composite
def plans(draw: st.DrawFn, products: tuple[str, ...] = (*SDPA, *WRITTEN), **fixed: Any) -> Plan:
    """Plans that the eager model can run.

    Args:
        fixed: values of fields that are not drawn.
    """
    product = draw(st.sampled_from(products))
    hand_written = product in WRITTEN
    layouts = {
        "bmm": ["folded"], "baddbmm": ["folded"], "einsum": ["transposed", "folded", "heads_third"],
    }.get(product, ["transposed", "permuted", "contiguous"])  # fmt: skip
    layout = draw(st.sampled_from(layouts) if product in ("einsum", "sdpa_gqa") else _mostly(*layouts, "folded"))
    tokens_of = draw(_mostly("self", "cross", "text_first", "text_last", "two_projections"))
    heads = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(_mostly(heads, 1, max(1, heads // 2)))
    stacked = ["chunk", "unbind"] if kv_heads == heads else ["split"]
    may_broadcast = hand_written and kv_heads == 1 and layout not in ("folded", "heads_third")
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    upcasts = ("scores", "argument", "q_and_k", "everything") if hand_written else ("nothing",)
    masks = (*OVER_KEYS, "filled", "rows", "heads", "causal", *(() if hand_written else ("is_causal",)))
    used = ("q", "k", "v", "output", *(("scores", "weights") if hand_written else ()))
    repeat = draw(st.sampled_from(["interleave", "expand", *(["broadcast"] if may_broadcast else [])]))
    meanwhile = ("q_meanwhile", "scores", "scores_by_statement") if hand_written else ()
    if hand_written and repeat != "expand":  # expanded heads may share their memory, which cannot be written to then
        meanwhile = (*meanwhile, "v_meanwhile")
    fields: dict[str, Any] = {
        "product": product,
        "layout": layout,
        "projections": draw(st.sampled_from(["separate", *([] if tokens_of == "cross" else stacked)])),
        "tokens_of": tokens_of,
        "batch": draw(st.integers(1, 3)),
        "tokens": draw(_mostly(64, 24, 65, 100, 130, 200)),
        "text_tokens": draw(st.sampled_from([3, 16, 40])),
        "layers": draw(_mostly(1, 2)),
        "heads": heads,
        "kv_heads": kv_heads,
        "repeat": repeat,
        "head_dim": draw(_mostly(16, 8, 24, 32)),
        "dtype": dtype,
        "autocast": draw(_mostly(None, "float16", "bfloat16")) if dtype == "float32" else None,
        "scale_on": draw(st.sampled_from(["nothing", "q", "k", "both", "scores"])),
        "divide": draw(st.booleans()),
        "upcast": draw(_mostly("nothing", *upcasts)),
        "mask": draw(_mostly(*masks)),
        "mask_kind": draw(st.sampled_from(["bool", "large", "infinite", *(["where"] if hand_written else [])])),
        "mask_first": hand_written and draw(st.booleans()),
        "dropout": draw(_mostly(0.0, 0.2)),
        "training": draw(_mostly(False, True)),
        "used": draw(_mostly("nothing", *used)),
        "written": draw(_mostly("nothing", "q_before", "q_after", "output", *meanwhile)),
        "dynamic": draw(_mostly(None, None, True)),  # takes three times as long
    }
    return Plan(**{**fields, **fixed})
