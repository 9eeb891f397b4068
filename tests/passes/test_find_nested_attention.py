from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import DIM, OPTIONS, TOKENS, Attention, Denoiser, capture, inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lite_compile
from lite_compile import Options, Reason, UnsupportedAttentionError
from lite_compile.backend import rewrite_graph
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_nested_attention import find_nested_attention


class Checkpointed(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Region(Attention):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Conditional(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: Attention.forward(self, x), lambda x: x.clone(), (x,))


class Around(nn.Module):
    """A block whose sub-graph holds the attention of a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Blocks(nn.Module):
    """Plain attention, then three times that of `kind`."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first = Denoiser()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = self.first(hidden_states, timestep, prompt)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "end"),
    [(Checkpointed, ""), (Region, ""), (Conditional, ""), (Around, ".attn")],
    ids=["checkpoint", "region", "cond", "around"],
)
def test_attention_in_sub_graphs_is_declined_under_its_name(kind: type[nn.Module], end: str) -> None:
    gm = capture(Blocks(kind), *inputs())
    assert len(find_attention(gm)) == 1
    _, _, report = rewrite_graph(gm, OPTIONS)
    assert [(site.layer, site.reason) for site in report.sites] == [
        ("first.attn", None),
        *((f"blocks.{number}{end}", Reason.SUBGRAPH) for number in range(3)),
    ]
    assert report.sites[1].q_shape == (1, 2, TOKENS, DIM // 2)


def test_a_function_has_the_name_of_its_sub_graph() -> None:
    def attend(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)

    gm = capture(lambda x: checkpoint(attend, x, use_reentrant=False), torch.ones(1, 2, TOKENS, 16))
    (site,) = find_nested_attention(gm)
    assert site.layer.startswith("wrap_body")
    assert find_nested_attention(capture(Denoiser(), *inputs())) == []


def test_it_counts_as_unsupported_unless_it_is_dense_by_design() -> None:
    def run(**options: Any) -> None:
        torch._dynamo.reset()
        given = {"inner": "eager", "min_seq_len": TOKENS, "on_unsupported": "error", **options}
        with torch.no_grad():
            torch.compile(Blocks(Region), backend="liteattention", options=given)(*inputs())

    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.0.*sub-graph"):
        run()
    run(exclude_layers=["blocks.*"])
    run(min_seq_len=TOKENS + 1)
    assert not Reason.SUBGRAPH.by_design
    assert {site.reason for site in lite_compile.report().graphs[-1].sites} == {Reason.SHORT}


def test_sub_graphs_are_left_alone() -> None:
    gm = capture(Blocks(Around), *inputs())
    graph, _, _ = rewrite_graph(gm, Options(min_seq_len=TOKENS))
    assert graph is not gm
    assert [len(find_attention(g)) for g in (gm, graph)] == [1, 0]
    assert len(find_nested_attention(graph)) == 3
