"""Find out whether a graph that is launched by itself has too little work for the host to keep ahead of the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from ..kernels.launch_cost import gpu_seconds, host_seconds
from ..options import Options
from .attention_site import AttentionSite
from .graph_inputs import fake_tensor, serve_only_below, size_hint, special_kind
from .trace_projections import is_product

SMALL_SHARE = 1 / 50
"""Products with less than this share of the largest one's operations are small: a LoRA adapter's, not a block's own."""


def find_launch_bound(gm: fx.GraphModule, sites: Sequence[AttentionSite], options: Options) -> str | None:
    """Why the graph would be slower for our op, which takes the host longer than dense attention does; None: it is not.

    Nothing is said where the user asks for more than speed or says what to rewrite, where CUDA graphs launch, and of
    devices, dtypes and sizes for which nobody knows. Where there is a reason, sizes for which there would be none by
    this estimate are compiled anew: a short clip must not leave the long ones after it dense.
    """
    wants_more_than_speed = (
        options.min_seq_len != "auto", options.kernel != "auto", options.qk_dtype, options.history, options.probe,
        options.must_skip is not None, options.must_compute is not None,
    )  # fmt: skip
    if any(wants_more_than_speed) or _has_cuda_graphs(options):
        return None
    queries = [q for site in sites if (q := fake_tensor(site.q)) is not None]
    if not queries or not all(map(_has_known_speed, queries)):
        return None
    work = count_products(gm.graph, sites)
    host, gpu = host_seconds(work.products, work.small), gpu_seconds(work.flops, queries[0].device)
    if not 0 < gpu < host:  # NaN where a size is unknown and another zero
        return None
    tokens = max((q.shape[0] * q.shape[2] for q in queries), key=lambda size: size_hint(size) or 0)
    serve_only_below(tokens, math.floor((size_hint(tokens) or 0) * host / gpu) + 1)
    return (
        f"launching {work.products} products may take the host {1e3 * host:.1f} ms, computing them takes the GPU "
        f"{1e3 * gpu:.1f} ms; compile the whole model, or with CUDA graphs (mode='reduce-overhead'), or set min_seq_len"
    )


def _has_known_speed(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype.itemsize == 2


def _has_cuda_graphs(options: Options) -> bool:
    import torch._inductor.config as inductor

    return bool(options.inductor_config().get("triton.cudagraphs", inductor.triton.cudagraphs))


class Work(NamedTuple):
    """Matrix products and attentions of a graph."""

    products: int
    small: int
    """How many of them are small beside the largest."""
    flops: float
    """Floating-point operations; infinite if unknown."""


def count_products(graph: fx.Graph, sites: Sequence[AttentionSite]) -> Work:
    """Count a graph's matrix products, attentions among them, and their operations. Asking adds no guard."""
    of_sites = {node for site in sites for node in (site.node, *site.inner)}
    flops = [_product_flops(node) for node in graph.nodes if node not in of_sites and is_product(node)]
    flops += [_attention_flops(site) for site in sites]
    least = SMALL_SHARE * max(flops, default=0.0)
    return Work(len(flops), sum(one < least for one in flops), math.fsum(flops))


def _product_flops(node: fx.Node) -> float:
    """Of `[M, K] @ [K, N]`, by the sizes of the three: the root of `MK * KN * MN`.

    The operands are taken to be the two largest inputs: a bias is less than either, unless M is small. Too many for
    batched products, too few for convolutions whose windows overlap and for `x @ x`; infinite where a result is no
    tensor.
    """
    out = fake_tensor(node)
    operands = sorted(_elements(x) for x in map(fake_tensor, node.all_input_nodes) if x is not None)[-2:]
    return math.inf if out is None else 2 * math.sqrt(math.prod(operands) * _elements(out))


def _attention_flops(site: AttentionSite) -> float:
    """Of both products, masked scores included."""
    q, k = fake_tensor(site.q), fake_tensor(site.k)
    if q is None or k is None or q.dim() != 4 or k.dim() != 4 or special_kind(k):
        return math.inf
    keys = size_hint(k.shape[2])
    return math.inf if keys is None else 4.0 * _elements(q) * keys


def _elements(x: torch.Tensor) -> float:
    """How many; infinite where that is not known."""
    if special_kind(x):
        return math.inf
    hints = list(map(size_hint, x.shape))
    return math.inf if None in hints else math.prod(hint for hint in hints if hint is not None)
