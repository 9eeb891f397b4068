"""Find out whether a graph that is launched by itself has too little work for the host to keep ahead of the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from ..kernels.launch_cost import gpu_seconds, host_seconds
from ..options import Options
from .attention_site import AttentionSite
from .graph_inputs import fake_tensor, size_hint, special_kind
from .trace_projections import is_product


def find_launch_bound(gm: fx.GraphModule, sites: Sequence[AttentionSite], options: Options) -> str | None:
    """Why the graph would be slower for our op, which takes the host longer than dense attention does; None: it is not.

    Nothing is said where the user asks for more than speed or says what to rewrite, where CUDA graphs launch, and of
    devices, dtypes and sizes for which nobody knows. Asking adds no guard.
    """
    given = (
        options.min_seq_len != "auto", options.kernel != "auto", options.qk_dtype, options.history, options.probe,
        options.must_skip is not None, options.must_compute is not None,
    )  # fmt: skip
    if any(given) or _has_cuda_graphs(options):
        return None
    queries = [q for site in sites if (q := fake_tensor(site.q)) is not None]
    if not queries or any(q.device.type != "cuda" or q.dtype.itemsize != 2 for q in queries):
        return None
    products, flops = count_products(gm.graph, sites)
    host, gpu = host_seconds(products), gpu_seconds(flops, queries[0].device)
    if not gpu < host:  # NaN where a size is unknown and another zero
        return None
    return (
        f"launching {products} products may take the host {1e3 * host:.1f} ms, computing them takes the GPU "
        f"{1e3 * gpu:.1f} ms; compile the whole model, or with CUDA graphs (mode='reduce-overhead'), or set min_seq_len"
    )


def _has_cuda_graphs(options: Options) -> bool:
    import torch._inductor.config as inductor

    return bool(options.inductor_config().get("triton.cudagraphs", inductor.triton.cudagraphs))


def count_products(graph: fx.Graph, sites: Sequence[AttentionSite]) -> tuple[int, float]:
    """How many matrix products and attentions a graph has, and their floating-point operations; infinite if unknown."""
    inner = {node for site in sites for node in (site.node, *site.inner)}
    flops = [_product_flops(node) for node in graph.nodes if node not in inner and is_product(node)]
    flops += [_attention_flops(site) for site in sites]
    return len(flops), math.fsum(flops)


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
