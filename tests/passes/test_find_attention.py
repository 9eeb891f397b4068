from __future__ import annotations

from collections.abc import Callable

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import Denoiser, assert_left_alone, capture, inputs
from torch import Tensor

from lite_compile import Reason
from lite_compile.passes.find_attention import find_attention, layer_names

CALLS = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "all_positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, is_causal=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call_styles_give_the_same_site(call: object) -> None:
    (site,) = find_attention(capture(Denoiser(call), *inputs()))
    assert [site.attn_mask, site.dropout_p, site.is_causal, site.scale, site.enable_gqa] == [
        None,
        0.0,
        False,
        None,
        False,
    ]
    assert site.layer == "attn"
    assert [tuple(n.meta["example_value"].shape) for n in (site.q, site.k, site.v)] == [(1, 2, 64, 16)] * 3


def test_arguments_are_kept() -> None:
    mask = torch.zeros(graphs.TOKENS, graphs.TOKENS)
    (site,) = find_attention(
        capture(Denoiser(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)), *inputs())
    )
    assert site.scale == 0.3
    assert site.attn_mask is not None


def test_other_attention_is_not_a_site() -> None:
    gm = capture(Denoiser(lambda q, k, v: (q @ k.transpose(-1, -2)).sigmoid() @ v), *inputs())
    assert find_attention(gm) == []


def test_spellings_are_found_in_execution_order() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT).softmax(-1) @ v
        second = F.scaled_dot_product_attention(first, k, v)
        return (second @ k.mT).softmax(-1) @ v

    sites = find_attention(capture(Denoiser(attend), *inputs()))
    assert [site.spelling.name for site in sites if site.spelling] == [
        "softmax attention", "scaled_dot_product_attention", "softmax attention",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (F.scaled_dot_product_attention, Reason.SUBCLASS),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, Reason.SUBCLASS),
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, Reason.SUBCLASS),
    ],
)
def test_attention_inside_of_a_vmap_stays_dense(attend: Callable[..., Tensor], reason: Reason) -> None:
    """Its values say nothing outside of the vmap, where states are allocated."""

    def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.vmap(attend)(q[:, None], k[:, None], v[:, None])
        return (result if isinstance(result, Tensor) else result[0])[:, 0]

    assert_left_alone(batched, reason)


def node_in(path: str | None) -> torch.fx.Node:
    node = torch.fx.Graph().placeholder("x")
    if path is not None:
        node.meta["nn_module_stack"] = {"0": ("L['self']", object), "1": (path, object)}
    return node


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0']._modules['attn1']", "blocks.0.attn1"),
        ("L['self'].blocks[3].attn", "blocks.3.attn"),
        ("L['self']._orig_mod.blocks.0", "blocks.0"),
        ("L['this'].blocks.0", "blocks.0"),
        ("L['selfish'].blocks.0", "blocks.0"),
        ("G['model'].blocks.0", "blocks.0"),
        ("L['self']", "attention_0"),
        (None, "attention_0"),
    ],
)
def test_layer_names(path: str | None, name: str) -> None:
    assert layer_names([node_in(path)]) == [name]


def test_layers_of_two_models_keep_apart() -> None:
    nodes = [node_in(path) for path in ("L['low'].blocks.0", "L['high'].blocks.0", None)]
    assert layer_names(nodes) == ["low.blocks.0", "high.blocks.0", "attention_2"]
