"""Protected tiles are computed whatever the state says: text keeps all of its attention, and all attend to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs import DIM, Attention
from joint_models import flux
from torch import Tensor, nn

import lite_compile
from lite_compile.kernels.select_kernel import select_kernel
from lite_compile.layer_state import layer_states
from lite_compile.skip_state import COMPUTED_WORD, row_layout, tile_count

VIDEO, TEXT = 330, 50
TILE = select_kernel(torch.device("cpu"), torch.float32, 16).tile  # type: ignore[union-attr]


class JointDenoiser(nn.Module):
    """Attention over text and video, the whole of its result as output."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.attn, self.text_first = Attention(), text_first

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        video = hidden_states + timestep[:, None, None].sin()
        pair = (encoder_hidden_states, video) if self.text_first else (video, encoder_hidden_states)
        return self.attn(torch.cat(pair, 1))


@pytest.fixture(params=[True, False], ids=["text first", "text last"])
def model(request: pytest.FixtureRequest) -> Iterator[JointDenoiser]:
    torch._dynamo.reset()
    lite_compile.clear_report()
    torch.manual_seed(0)
    denoiser = JointDenoiser(request.param).eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        yield denoiser


def compiled(model: nn.Module, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf, **options}
    return torch.compile(model, backend="liteattention", fullgraph=True, dynamic=dynamic, options=options)


def step(number: int, video: int = VIDEO, text: int = TEXT) -> dict[str, Tensor]:
    """Arguments of one denoising step."""
    noise = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, video, DIM, generator=noise), torch.randn(1, text, DIM, generator=noise)
    return {
        "hidden_states": latents * (1 - number / 10),
        "timestep": torch.tensor([1000.0 - 100 * number]),
        "encoder_hidden_states": prompt,
    }


def mark_everything(model: nn.Module) -> None:
    """Set every skip bit of the current masks."""
    for state in layer_states(model):
        layout = row_layout(tile_count(state.spec.k_len, state.spec.tile.k))
        state.state[..., layout.mask_start :] = -1


def touched(ranges: list[tuple[int, int]], tile: int, length: int) -> Tensor:
    """Which tokens lie in a tile that holds a protected one."""
    tokens = torch.zeros(length, dtype=torch.bool)
    for start, end in ranges:
        tokens[start // tile * tile : math.ceil(end / tile) * tile] = True
    return tokens


def over_keys(model: JointDenoiser, keys: Tensor, call: dict[str, Tensor]) -> Tensor:
    """The model's result if its queries saw no other keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k[:, :, keys], v[:, :, keys])

    dense, model.attn.attend = model.attn.attend, attend
    try:
        return model(**call)
    finally:
        model.attn.attend = dense


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("protect", ["auto", [(100, 110), (-70, -3)]], ids=str)
def test_protected_tiles_are_computed_though_everything_is_marked(
    model: JointDenoiser, protect: Any, dynamic: bool
) -> None:
    length = VIDEO + TEXT
    text = (0, TEXT) if model.text_first else (VIDEO, length)
    ranges = [text] if protect == "auto" else [(100, 110), (length - 70, length - 3)]
    sparse = compiled(model, dynamic, protect=protect)
    sparse(**step(0))
    mark_everything(model)
    out = sparse(**step(1))[0]

    keys, rows = touched(ranges, TILE.k, length), touched(ranges, TILE.q, length)
    assert not rows.all()
    dense = model(**step(1))[0]
    torch.testing.assert_close(out[rows], dense[rows])
    torch.testing.assert_close(out[~rows], over_keys(model, keys, step(1))[0][~rows])
    assert rows[text[0] : text[1]].all() or protect != "auto"

    (state,) = layer_states(model)
    computed = state.state[:, 0, :, :, COMPUTED_WORD].amax(0)
    k_tiles = tile_count(length, TILE.k)
    expected = [k_tiles if tile else int(keys[:: TILE.k].sum()) for tile in rows[:: TILE.q]]
    assert computed.tolist() == [expected] * computed.shape[0]


def test_without_protection_everything_that_is_marked_is_skipped(model: JointDenoiser) -> None:
    sparse = compiled(model, protect=[])
    sparse(**step(0))
    mark_everything(model)
    assert not sparse(**step(1)).any()


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("protect", ["auto", [(0, 20), (-300, None)]], ids=str)
def test_other_lengths_need_no_other_graph(model: JointDenoiser, inner: str, protect: Any) -> None:
    sparse = compiled(model, dynamic=True, inner=inner, protect=protect)
    for video, text in ((330, 50), (200, 60), (333, 20), (100, 41)):
        torch.testing.assert_close(sparse(**step(0, video, text)), model(**step(0, video, text)))
    assert len(lite_compile.report().graphs) == 1


def test_a_joint_model_of_any_length_is_compiled_once() -> None:
    torch._dynamo.reset()
    lite_compile.clear_report()
    model, _, _ = flux()
    sparse = compiled(model, dynamic=True)
    with torch.no_grad():
        for latents, text in ((48, 16), (60, 20), (30, 9)):
            _, call, _ = flux(latents, text)
            torch.testing.assert_close(sparse(**call)[0], model(**call)[0])
    (graph,) = lite_compile.report().graphs
    assert all(site.protected for site in graph.sites)
    assert all(isinstance(site.protected[0][1], str) for site in graph.sites)


def test_blocks_that_are_compiled_one_by_one_protect_the_same() -> None:
    torch._dynamo.reset()
    lite_compile.clear_report()
    model, call, text = flux()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):  # type: ignore[misc, union-attr]
        block.compile(backend="liteattention", options={"inner": "eager", "min_seq_len": 1})
    with torch.no_grad():
        model(**call)
    assert [list(site.protected) for site in lite_compile.report()] == list(text.values())
