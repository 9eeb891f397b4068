"""aten's fused kernels, and stand-ins with the names and schemas of xformers' and flash-attn's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import HEADS, OPTIONS, Denoiser, inputs, run_both
from test_insert_step_guard import lines_with
from torch import Tensor

from lite_compile import Reason
from lite_compile.backend import rewrite_graph

aten = torch.ops.aten
SCHEMAS = {
    "flash_attn::_flash_attn_forward": (
        "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
        "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "flash_attn::flash_attn_func": (
        "(Tensor q, Tensor k, Tensor v, float dropout_p=0.0, float? softmax_scale=None, bool causal=False, "
        "int[] window_size=[-1, -1], float softcap=0.0, Tensor? alibi_slopes=None, bool deterministic=False, "
        "bool return_attn_probs=False) -> Tensor"
    ),
    "flash_attn_3::fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? cu_seqlens_q=None, float? softmax_scale=None, "
        "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, "
        "float softcap=0.0, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor)"
    ),
    "xformers::memory_efficient_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, float p=0.0, float? scale=None) -> Tensor"
    ),
    "xformers::efficient_attention_forward_cutlass": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? seqstart_q, Tensor? seqstart_k, "
        "int? max_seqlen_q, float dropout_p, bool compute_logsumexp, int custom_mask_type, float? scale=None, "
        "Tensor? seqlen_k=None, int? window_size=None) -> (Tensor, Tensor, int, int)"
    ),
    "xformers::efficient_attention_backward": "(Tensor query, Tensor key, Tensor value) -> Tensor",
    "someone::memory_efficient_attention": "(Tensor q, Tensor k, Tensor v) -> Tensor",
    "someone::sage": "(Tensor q, Tensor k, Tensor v) -> Tensor",
    "flash_attn::flash_attn_varlen_func": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q) -> Tensor",
}


def stand_in(name: str, schema: str) -> Callable[..., Any]:
    """Dense attention of `[B, S, H, D]` or `[B * H, S, D]` with the outputs that the schema wants."""
    outputs = schema.split("->")[1]

    names = [argument.name for argument in torch._C.parse_schema(name + schema).arguments]

    def compute(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (x if x.dim() == 3 else x.transpose(1, 2) for x in args[:3])
        scale = given.get("softmax_scale", given.get("scale"))
        out = F.scaled_dot_product_attention(q, k, v, given.get("attn_bias"), scale=scale, enable_gqa=q.dim() == 4)
        out = (out if out.dim() == 3 else out.transpose(1, 2)).contiguous()
        tensors = [out, *(q.new_zeros(1) for _ in range(outputs.count("Tensor") - 1))]
        results = (*tensors, *(0 for _ in range(outputs.count("int"))))
        return results if len(results) > 1 else out

    return compute


@pytest.fixture(autouse=True, scope="module")
def operators() -> Iterator[None]:
    libraries = []
    for name, schema in SCHEMAS.items():
        namespace, operator = name.split("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(operator + schema)
        library.impl(operator, stand_in(name, schema), "CompositeExplicitAutograd")
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


def op(name: str, *rest: Any, first: bool = False, overload: bool = True, **kwargs: Any) -> Callable[..., Tensor]:
    """An attend that calls the stand-in `name` with `[B, S, H, D]`; `first` takes the first of several outputs."""
    namespace, operator = name.split("::")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = getattr(getattr(torch.ops, namespace), operator)
        function = function.default if overload else function
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), *rest, **kwargs)
        out = out[0] if first else out
        result: Tensor = out.transpose(1, 2)
        return result

    return attend


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.xformers.memory_efficient_attention(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)))
    return out.reshape(q.shape)


def more_queries(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Twice as many heads in q."""
    return lambda q, k, v: attend(torch.cat([q, 2 * q], 1), k, v)[:, 1 : HEADS + 1]


def key_bias(q: Tensor) -> Tensor:
    """Additive `[1, 1, 1, S]`."""
    return torch.arange(q.shape[2], device=q.device).to(q.dtype).view(1, 1, 1, -1) * -0.1


FA2 = "flash_attn::_flash_attn_forward"
CUTLASS = "xformers::efficient_attention_forward_cutlass"
NO_MASK = (None, None, None, None, 0.0, False, 0)
REWRITTEN: dict[str, Any] = {
    "aten_cpu": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "aten_cpu_default": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=0.2)[0],
    "aten_math": lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v)[0],
    "aten_sdpa": lambda q, k, v: aten.scaled_dot_product_attention.default(q, k, v),
    "flash_attn_2": op(FA2, 0.0, 0.3, False, -1, -1, 0.0, None, False, first=True),
    "flash_attn_func": op("flash_attn::flash_attn_func"),
    "flash_attn_func_packet": op(
        "flash_attn::flash_attn_func", overload=False, window_size=[-1, -1], softmax_scale=0.3
    ),
    "flash_attn_3": op("flash_attn_3::fwd", first=True, num_splits=1, softmax_scale=0.3),
    "flash_attn_shared_heads": more_queries(op("flash_attn::flash_attn_func")),
    "xformers": op("xformers::memory_efficient_attention"),
    "xformers_scale": op("xformers::memory_efficient_attention", p=0.0, scale=0.3),
    "xformers_cutlass": op(CUTLASS, *NO_MASK, first=True, scale=0.3),
    "xformers_folded": folded,
    "xformers_key_bias": lambda q, k, v: op("xformers::memory_efficient_attention", key_bias(q))(q, k, v),
    "aten_key_bias": lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v, key_bias(q))[0],
    "another_namespace": op("someone::memory_efficient_attention"),
}
ON_OTHER_DEVICES: dict[str, Any] = {
    "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention.default(q, k, v)[0],
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False)[0],
    "efficient_with_lse": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0)[0],
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False, 0.0, False)[0],
    "overrideable": lambda q, k, v: aten._scaled_dot_product_fused_attention_overrideable.default(q, k, v)[0],
}
"""Dynamo captures them on a CPU, where they cannot run."""


def two_outputs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    result: Tensor = out + lse[..., None]
    return result


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return op("xformers::memory_efficient_attention", q @ k.mT)(q, k, v)


DECLINED: dict[str, Any] = {
    "lse_used": (two_outputs, Reason.SHARED),
    "aten_causal": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0], Reason.CAUSAL,
    ),
    "aten_dropout": (
        lambda q, k, v: aten._scaled_dot_product_attention_math.default(q, k, v, None, 0.1)[0], Reason.DROPOUT,
    ),
    "aten_mask": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=q @ k.mT)[0], Reason.MASK,
    ),
    "bias": (biased, Reason.MASK),
    "bool_mask": (
        lambda q, k, v: op("xformers::memory_efficient_attention", key_bias(q) < 0)(q, k, v), Reason.MASK,
    ),
    "shared_heads": (more_queries(op("xformers::memory_efficient_attention")), Reason.GQA),
    "dropout": (op("xformers::memory_efficient_attention", p=0.1), Reason.DROPOUT),
    "causal": (op("flash_attn::flash_attn_func", causal=True), Reason.CAUSAL),
    "window": (op("flash_attn::flash_attn_func", window_size=[4, 4]), Reason.VARIANT),
    "left_window": (op(FA2, 0.0, 0.3, False, 8, -1, 0.0, None, False, first=True), Reason.VARIANT),
    "softcap": (op("flash_attn_3::fwd", first=True, softcap=30.0), Reason.VARIANT),
    "chunks": (op("flash_attn_3::fwd", first=True, attention_chunk=16), Reason.VARIANT),
    "custom_mask": (op(CUTLASS, *NO_MASK[:-1], 1, first=True), Reason.VARIANT),
    "alibi": (
        lambda q, k, v: op("flash_attn::flash_attn_func", alibi_slopes=q.mean((0, 2, 3)))(q, k, v), Reason.VARIANT,
    ),
    "backward": (op("xformers::efficient_attention_backward"), None),
    "quantised": (op("someone::sage"), None),
    "varlen": (lambda q, k, v: op("flash_attn::flash_attn_varlen_func", q.mean())(q, k, v), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REWRITTEN)
def test_result_is_that_of_the_dense_attention(name: str) -> None:
    dense, sparse = run_both(Denoiser(REWRITTEN[name]), batch=2)
    torch.testing.assert_close(sparse, dense)
    assert sparse.stride() == dense.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*REWRITTEN, *ON_OTHER_DEVICES])
def test_what_is_rewritten(name: str, dynamic: bool) -> None:
    attend = {**REWRITTEN, **ON_OTHER_DEVICES}[name]
    gm, _, report = rewrite_graph(captured(attend, dynamic=dynamic), OPTIONS)
    assert [(site.layer, site.decision) for site in report.sites] == [("attn", "rewritten")]
    text = lines_with(gm, "")
    assert text.count("attention") + text.count("flash") + text.count("fwd") == 0


@pytest.mark.parametrize("name", DECLINED)
def test_what_stays_as_it_is(name: str) -> None:
    attend, reason = DECLINED[name]
    gm = captured(attend)
    before = gm.code
    rewritten, _, report = rewrite_graph(gm, OPTIONS)
    assert [site.reason for site in report.sites] == ([] if reason is None else [reason])
    assert rewritten is gm
    assert gm.code == before


def captured(attend: Any, dynamic: bool | None = None) -> torch.fx.GraphModule:
    """The graph of a `Denoiser`, which is not run: on this machine some of the operators cannot be."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        shapes = [node.meta["example_value"].shape for node in gm.graph.output_node().all_input_nodes]
        return lambda *_: [torch.zeros([int(size) for size in shape]) for shape in shapes]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Denoiser(attend), backend=keep, fullgraph=True, dynamic=dynamic)(*inputs(batch=2))
    (gm,) = graphs
    return gm
