"""Find out whether a graph that is launched by itself has too little work for the host to keep ahead of the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import sympy
import torch
from torch import fx

from ..kernels.launch_cost import gpu_seconds, host_seconds
from ..options import Options
from .attention_site import AttentionSite
from .graph_inputs import fake_tensor, size_hint, special_kind
from .served_sizes import Below, symbols_of
from .trace_projections import is_product

SMALL_SHARE = 1 / 50
"""Products with less than this share of the largest one's operations are small: a LoRA adapter's, not a block's own."""


class LaunchBound(NamedTuple):
    """Why a graph had better stay dense."""

    detail: str
    below: Below | None
    """Of what sizes alone this is said; None: the graph has no other."""


def find_launch_bound(gm: fx.GraphModule, sites: Sequence[AttentionSite], options: Options) -> LaunchBound | None:
    """Why the graph would be slower for our op, which takes the host longer than dense attention does; None: it is not.

    Nothing is said where the user asks for more than speed or says what to rewrite, where CUDA graphs launch, and of
    devices, dtypes and sizes for which nobody knows. Asking adds no guard.
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
    products, device = list_products(gm.graph, sites), queries[0].device
    host, gpu = host_seconds(len(products), count_small(products)), gpu_seconds(total_flops(products), device)
    if not 0 < gpu < host:  # NaN where a size is unknown and another zero
        return None
    detail = (
        f"launching {len(products)} products may take the host {1e3 * host:.1f} ms, computing them takes the GPU "
        f"{1e3 * gpu:.1f} ms; compile the whole model, or with CUDA graphs (mode='reduce-overhead'), or set min_seq_len"
    )
    return LaunchBound(detail, _find_limit(products, queries, host, device))


def _find_limit(
    products: Sequence[Product], queries: Sequence[torch.Tensor], host: float, device: torch.device
) -> Below | None:
    """How many tokens the GPU, too, takes `host` seconds for.

    In one batch self-attention grows with the square of their number, other products with their number, or not at all,
    such as projections of text.
    """
    symbolic = [q for q in queries if isinstance(q.shape[0] * q.shape[2], torch.SymInt)]
    if not symbolic:
        return None
    longest = max(symbolic, key=lambda q: size_hint(q.shape[0] * q.shape[2]) or 0)
    symbols = symbols_of(longest.shape[2]) or symbols_of(longest.shape[0])
    by_degree: list[list[Product]] = [[], [], []]
    for product in products:
        by_degree[bool(symbols & product.symbols) + bool(symbols & product.key_symbols)].append(product)
    fixed, linear, square = (gpu_seconds(total_flops(of_degree), device) for of_degree in by_degree)
    left = host - fixed
    root = linear + math.sqrt(linear**2 + 4 * square * left)  # of square x^2 + linear x = left
    tokens = longest.shape[0] * longest.shape[2]
    return Below(tokens, math.floor((size_hint(tokens) or 0) * 2 * left / root) + 1) if root else None


def _has_known_speed(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype.itemsize == 2


def _has_cuda_graphs(options: Options) -> bool:
    import torch._inductor.config as inductor

    return bool(options.inductor_config().get("triton.cudagraphs", inductor.triton.cudagraphs))


class Product(NamedTuple):
    """A matrix product or an attention."""

    flops: float
    """Floating-point operations; infinite if unknown."""
    symbols: set[sympy.Symbol]
    """What sizes of the result are computed from."""
    key_symbols: set[sympy.Symbol]
    """What the number of an attention's keys is computed from."""


def list_products(graph: fx.Graph, sites: Sequence[AttentionSite]) -> list[Product]:
    """A graph's matrix products, and its attentions."""
    of_sites = {node for site in sites for node in (site.node, *site.inner)}
    found = [
        Product(_product_flops(node), _symbols(fake_tensor(node)), set())
        for node in graph.nodes
        if node not in of_sites and is_product(node)
    ]
    for site in sites:
        q, k = fake_tensor(site.q), fake_tensor(site.k)
        keys = set[sympy.Symbol]() if k is None or k.dim() != 4 or special_kind(k) else symbols_of(k.shape[2])
        found.append(Product(_attention_flops(site), _symbols(q), keys))
    return found


def total_flops(products: Sequence[Product]) -> float:
    """Floating-point operations of all; infinite if unknown."""
    return math.fsum(product.flops for product in products)


def count_small(products: Sequence[Product]) -> int:
    """How many products are small beside the largest."""
    least = SMALL_SHARE * max((product.flops for product in products), default=0.0)
    return sum(product.flops < least for product in products)


def _symbols(x: torch.Tensor | None) -> set[sympy.Symbol]:
    return set() if x is None or special_kind(x) else set[sympy.Symbol]().union(*map(symbols_of, x.shape))


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
