"""Blocks whose launches take the host longer than the GPU works stay dense, unless somebody asks for more."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from graphs import Denoiser, capture, inputs
from models import OPTIONS, denoise, noise, prompt, tiny_wan
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lite_compile
from lite_compile import Options, Reason, backend
from lite_compile.kernels import launch_cost
from lite_compile.passes import find_launch_bound as module
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_launch_bound import (
    LaunchBound,
    count_small,
    find_launch_bound,
    list_products,
    total_flops,
)

GPUS = {
    "H100": SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000),
    "A100": SimpleNamespace(major=8, minor=0, multi_processor_count=108, clock_rate=1_410_000),
    "RTX 4090": SimpleNamespace(major=8, minor=9, multi_processor_count=128, clock_rate=2_520_000),
}
DIM_1_3B, DIM_14B = (1536, 8960), (5120, 13824)


class Adapted(nn.Linear):
    """A linear layer with a LoRA adapter of that rank; 0: without."""

    def __init__(self, features: int, out_features: int, rank: int) -> None:
        super().__init__(features, out_features)
        self.rank = rank
        self.a, self.b = nn.Linear(features, rank, bias=False), nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.b(self.a(x)) if self.rank else out


class Block(nn.Module):
    """The products of a block of Wan; no memory."""

    def __init__(self, dim: int, ffn: int, rank: int = 0) -> None:
        super().__init__()
        with torch.device("meta"):
            self.own, self.other = (nn.ModuleList(Adapted(dim, dim, rank) for _ in range(4)) for _ in range(2))
            self.up, self.down = Adapted(dim, ffn, rank), Adapted(ffn, dim, rank)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for layers, other in ((self.own, x), (self.other, text)):
            q, k, v = (layers[i](y).unflatten(-1, (-1, 128)).transpose(1, 2) for i, y in enumerate((x, other, other)))
            x = x + layers[3](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


def graph_of(
    tokens: int,
    sizes: tuple[int, int] = DIM_1_3B,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
) -> fx.GraphModule:
    """The graph of a block with as many tokens and 512 of text, as if it were on that device, of that dtype."""
    dim, ffn = sizes
    arguments = (torch.empty(1, length, dim, dtype=torch.bfloat16, device="meta") for length in (tokens, 512))
    gm = capture(Block(dim, ffn, rank), *arguments)
    with FakeTensorMode():
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                node.meta["example_value"] = torch.empty(value.shape, dtype=dtype, device=device)
    return gm


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def launch_bound(gm: fx.GraphModule, **options: Any) -> LaunchBound | None:
    return find_launch_bound(gm, find_attention(gm), Options(**options))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    name = getattr(request, "param", "H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: GPUS[name])


@pytest.mark.parametrize("model", [tiny_wan(), Denoiser(cross=True)], ids=["Wan", "denoiser"])
def test_products_are_counted_as_torch_counts_them(model: nn.Module) -> None:
    wan = {"hidden_states": noise(0), "timestep": torch.tensor([500.0]), "encoder_hidden_states": prompt(0)}
    args, kwargs = (inputs(), {}) if isinstance(model, Denoiser) else ((), wan)
    gm = capture(model, *args, **kwargs)
    products = list_products(gm.graph, find_attention(gm))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # which is made of products that are counted
        model(*args, **kwargs)
    # Of a product of one row the bias may be larger than the row, and is taken for it.
    assert math.isclose(total_flops(products), counter.get_total_flops(), rel_tol=1e-3)
    assert len(products) >= 8


def test_an_attention_spelled_as_products_is_counted_once() -> None:
    def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    counted = []
    for attend in (F.scaled_dot_product_attention, spelled):
        gm = capture(Denoiser(attend), *inputs())
        counted.append(list_products(gm.graph, find_attention(gm)))
    assert counted[0] == counted[1]


def test_symbolic_sizes_count_as_they_were_and_are_not_guarded() -> None:
    counted = []
    for dynamic in (False, True):
        gm = capture(Denoiser(), *inputs(), dynamic=dynamic)
        sites = find_attention(gm)
        sizes = [size for node in gm.graph.nodes if node.op == "placeholder" for size in shape_of(node)]
        symbols = [size for size in sizes if isinstance(size, torch.SymInt)]
        assert bool(symbols) is dynamic
        guards = [len(size.node.shape_env.guards) for size in symbols]
        counted.append([product.flops for product in list_products(gm.graph, sites)])
        assert guards == [len(size.node.shape_env.guards) for size in symbols]
    assert counted[0] == counted[1]


def test_unknown_sizes_are_no_reason(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = graph_of(4096)
    assert launch_bound(gm) is not None
    monkeypatch.setattr(module, "size_hint", lambda size: None if size == 4096 else size)
    assert launch_bound(gm) is None


def test_one_site_on_another_device_is_enough_to_say_nothing(gpu: None) -> None:
    gm = graph_of(4096)
    sites = find_attention(gm)
    with FakeTensorMode():
        query = sites[-1].q.meta["example_value"]
        sites[-1].q.meta["example_value"] = torch.empty(query.shape, dtype=query.dtype, device="cpu")
    assert find_launch_bound(gm, sites, Options()) is None


def test_sites_that_are_not_understood_may_be_long(gpu: None) -> None:
    gm = graph_of(4096)
    sites = find_attention(gm)
    with FakeTensorMode():
        sites[-1].k.meta["example_value"] = torch.empty(3, 4, dtype=torch.bfloat16, device="cuda")
    assert find_launch_bound(gm, sites, Options()) is None


def test_a_graph_without_attention_has_none_to_leave(gpu: None) -> None:
    gm = graph_of(4096)
    assert find_launch_bound(gm, [], Options()) is None


@pytest.mark.parametrize(
    ("gpu", "tokens", "sizes", "bound"),
    [
        ("H100", 4096, DIM_1_3B, True),
        ("H100", 8192, DIM_1_3B, False),
        ("H100", 4096, DIM_14B, False),
        ("A100", 4096, DIM_1_3B, False),
        ("RTX 4090", 4096, DIM_1_3B, False),
        ("RTX 4090", 512, DIM_1_3B, True),
    ],
    indirect=["gpu"],
)
def test_blocks_with_too_little_work(gpu: None, tokens: int, sizes: tuple[int, int], bound: bool) -> None:
    assert (launch_bound(graph_of(tokens, sizes)) is not None) is bound


@pytest.mark.parametrize(("tokens", "bound"), [(4096, True), (8192, False)])
def test_an_adapter_does_not_make_a_long_block_dense(gpu: None, tokens: int, bound: bool) -> None:
    gm = graph_of(tokens, rank=16)
    products = list_products(gm.graph, find_attention(gm))
    assert len(products) == 12 + 20
    assert 20 <= count_small(products) <= 22  # projections of text may be small, too
    assert (launch_bound(gm) is not None) is bound


def test_the_report_says_what_takes_how_long_and_what_helps(gpu: None) -> None:
    found = launch_bound(graph_of(4096))
    assert found is not None
    detail, below = found
    assert below is None  # there are no other sizes
    assert "12 products may take the host 1.2 ms, computing them takes the GPU 0.9 ms" in detail
    assert "compile the whole model, or with CUDA graphs (mode='reduce-overhead'), or set min_seq_len" in detail


@pytest.mark.parametrize(
    "options",
    [
        {"min_seq_len": 1024},
        {"kernel": "triton"},
        {"qk_dtype": "fp8"},
        {"must_skip": [(0, 10)]},
        {"must_compute": []},
        {"history": True},
        {"probe": True},
        {"mode": "reduce-overhead"},
        {"inductor": {"triton.cudagraphs": True}},
    ],
    ids=str,
)
def test_who_asks_for_more_than_speed_gets_it(gpu: None, options: dict[str, Any]) -> None:
    assert launch_bound(graph_of(4096), **options) is None


def test_cuda_graphs_may_be_asked_for_of_inductor_itself(gpu: None) -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert launch_bound(graph_of(4096)) is None
        assert launch_bound(graph_of(4096), inductor={"triton.cudagraphs": False}) is not None


def test_nobody_knows_how_fast_other_devices_and_dtypes_are(gpu: None) -> None:
    assert launch_bound(graph_of(4096, device="cpu")) is None
    assert launch_bound(graph_of(4096, dtype=torch.float32)) is None


def test_a_block_stays_dense_and_a_whole_model_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_launch_bound", lambda *_: LaunchBound("too little work", None))
    plain = denoise(tiny_wan(), noise(0), [prompt(0)], 4)
    for part, reasons in (
        ("blocks", {Reason.LAUNCHES: 1, Reason.CROSS_ATTENTION: 1}),
        ("whole", {Reason.CROSS_ATTENTION: 2}),
    ):
        torch._dynamo.reset()
        lite_compile.clear_report()
        model = tiny_wan()
        if part == "blocks":
            model.compile_repeated_blocks(backend="liteattention", options={**OPTIONS, "on_unsupported": "error"})
        else:
            model.compile(backend="liteattention", options=OPTIONS)
        result = denoise(model, noise(0), [prompt(0)], 4)
        assert lite_compile.report().reasons() == reasons
        if part == "blocks":
            assert "too little work" in str(lite_compile.report())
            torch.testing.assert_close(result, plain)


def test_what_a_graph_break_leaves_of_a_whole_model_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_launch_bound", lambda *_: LaunchBound("too little work", None))
    lite_compile.clear_report()
    torch._dynamo.reset()
    model = tiny_wan()
    model.condition_embedder.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    run = torch.compile(model, backend="liteattention", options=OPTIONS)
    denoise(run, noise(0), [prompt(0)], 4)
    assert any(graph.sites and graph.clock.startswith("hooks on") for graph in lite_compile.report().graphs)
    assert Reason.LAUNCHES not in lite_compile.report().reasons()
    assert len(lite_compile.report().rewritten) == len(model.blocks)


class Wrapped(nn.Module):
    """Calls a denoiser whose arguments have names that nobody knows."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        out: Tensor = self.denoiser(latents, timestep, prompt)
        return out


class OddlyNamed(Denoiser):
    def forward(self, img: Tensor, when: Tensor, txt: Tensor) -> Tensor:
        return super().forward(img, when, txt)


class AttentionOfItsOwn(nn.Module):
    """A root whose own forward attends, after a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(32, 96)

    def forward(self, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = latents + timestep[:, None, None]
        torch._dynamo.graph_break()
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("make", [lambda run: Wrapped(run(OddlyNamed())), lambda run: run(AttentionOfItsOwn())])
def test_a_whole_denoiser_is_no_block(make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_launch_bound", lambda *_: LaunchBound("too little work", None))
    lite_compile.clear_report()
    torch._dynamo.reset()
    options = {"inner": "eager", "min_seq_len": 16}
    model = make(lambda module: torch.compile(module, backend="liteattention", options=options))
    with torch.no_grad():
        model(*inputs())
    assert len(lite_compile.report().rewritten) == 1


@pytest.mark.parametrize("refined", [False, True])
def test_a_block_may_call_its_layers_what_the_root_calls_another(
    refined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_launch_bound", lambda *_: LaunchBound("too little work", None))
    lite_compile.clear_report()
    torch._dynamo.reset()
    model = tiny_wan()
    if refined:
        model.attn1 = nn.Linear(3, 3)
    model.compile_repeated_blocks(backend="liteattention", options=OPTIONS)
    denoise(model, noise(0), [prompt(0)], 2)
    assert Reason.LAUNCHES in lite_compile.report().reasons()


def test_estimates_grow_with_what_is_estimated(gpu: None) -> None:
    seconds = launch_cost.gpu_seconds(462e9, torch.device("cuda"))
    assert seconds == pytest.approx(0.87e-3, rel=0.03), "what was measured"
    assert launch_cost.gpu_seconds(924e9, torch.device("cuda")) == pytest.approx(2 * seconds)
    assert launch_cost.host_seconds(24) == pytest.approx(2 * launch_cost.host_seconds(12))
