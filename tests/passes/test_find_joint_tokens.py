"""Text among the tokens of an attention: every layout in which it comes, and what cannot be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import DIM, HEADS, Attention, capture
from joint_models import JOINT_MODELS
from torch import Tensor, nn

from lite_compile import Reason
from lite_compile.passes.attention_site import AttentionSite, Declined, Protection
from lite_compile.passes.find_attention import find_attention
from lite_compile.passes.find_joint_tokens import find_joint_tokens
from lite_compile.passes.graph_inputs import fake_mode, size_hint
from lite_compile.passes.token_roles import size_value

VIDEO, TEXT = 24, 10
Layout = Callable[["Joint", Tensor, Tensor], Tensor]


class Joint(nn.Module):
    """A model that gets its latents and its text together in one of many ways."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.attn, self.added, self.refiner = Attention(), Attention(), Attention()
        self.norm, self.modulation = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM)
        self.mlp, self.fused, self.wide = nn.Linear(DIM, 4 * DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(5 * DIM, DIM)
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.conv = nn.Conv1d(2 * TEXT, TEXT, 1)
        self.registers = nn.Parameter(torch.zeros(1, 4, DIM))
        self.layout = layout

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.layout(self, hidden_states, encoder_hidden_states)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def rope(x: Tensor) -> Tensor:
    """Rotary embedding of `[B, H, S, D]`, its angles computed from the length."""
    angles = torch.arange(x.shape[2])[:, None] * torch.ones(x.shape[3] // 2)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-imaginary, real], -1).flatten(3)
    return x * angles.cos().repeat_interleave(2, -1) + rotated * angles.sin().repeat_interleave(2, -1)


def cat_before_projection(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat([text, video], dim=1))[:, text.shape[1] :]


def cat_and_split(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat([text, video], dim=1)).split([text.shape[1], video.shape[1]], dim=1)[1]


def text_last(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat((video, text), 1))[:, : -text.shape[1]]


def stacked_horizontally(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.hstack([video, text]))


def stacked_vertically(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.vstack([text.transpose(0, 1), video.transpose(0, 1)]).transpose(0, 1))


def padded_and_added(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(F.pad(video, (0, 0, 0, text.shape[1])) + F.pad(text, (0, 0, video.shape[1], 0)))


def padded_channels(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(F.pad(torch.cat([text, video], 1)[..., :30], (1, 1)))


def text_on_both_sides(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat((text, video, 2 * text), 1)).narrow(1, text.shape[1], video.shape[1])


def projected(m: Joint, video: Tensor, text: Tensor, rotate: Callable[[Tensor], Tensor], both: bool) -> Tensor:
    """Each stream has its own projections; `both` are rotated after they were put together, or the video before."""
    q, k, v = (
        [heads(linear(x)) for linear, x in zip(pair, (text, video), strict=True)]
        for pair in ((m.added.to_q, m.attn.to_q), (m.added.to_k, m.attn.to_k), (m.added.to_v, m.attn.to_v))
    )
    if both:
        q, k = rotate(torch.cat(q, 2)), rotate(torch.cat(k, 2))
    else:
        q, k = torch.cat([q[0], rotate(q[1])], 2), torch.cat([k[0], rotate(k[1])], 2)
    out = F.scaled_dot_product_attention(q, k, torch.cat(v, 2)).transpose(1, 2).flatten(2, 3)
    return out[:, text.shape[1] :]


def cat_before_rope(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return projected(m, video, text, rope, both=True)


def cat_after_rope(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return projected(m, video, text, rope, both=False)


def rope_in_place(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    q, k, v = (heads(linear(torch.cat([text, video], 1))) for linear in (m.attn.to_q, m.attn.to_k, m.attn.to_v))
    q[:, :, text.shape[1] :] = rope(q[:, :, text.shape[1] :])
    k[:, :, text.shape[1] :] = rope(k[:, :, text.shape[1] :])
    return F.scaled_dot_product_attention(q, k, v)[:, :, text.shape[1] :]


def complex_rope(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1)
    q, k, v = (linear(joint).unflatten(-1, (HEADS, -1)) for linear in (m.attn.to_q, m.attn.to_k, m.attn.to_v))
    turns = torch.polar(torch.ones(DIM // HEADS // 2), torch.arange(DIM // HEADS // 2.0))
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(3)
        for x in (q, k.data)
    )
    return F.scaled_dot_product_attention(*(x.permute(0, 2, 1, 3) for x in (q, k, v)))[:, :, text.shape[1] :]


def many_blocks_later(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """Blocks of one stream: norms that are modulated by pooled text, an MLP beside the attention, residuals."""
    x = torch.cat([text, video], 1)
    shift, scale = m.modulation(text.mean(1)).chunk(2, dim=-1)
    for _ in range(2):
        normed = m.norm(x) * (1 + scale[:, None]) + shift[:, None]
        x = x + m.wide(torch.cat([m.attn(normed), F.gelu(m.mlp(normed))], dim=-1))
    return x[:, text.shape[1] :]


def refined_text(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    text = text + m.refiner(text)
    return m.attn(torch.cat([text, video], 1))[:, text.shape[1] :]


def fused_projection(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    qkv = m.fused(torch.cat([text, video], 1)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)[:, text.shape[1] :]


def stacked_projections(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1)
    qkv = torch.stack([heads(linear(joint)) for linear in (m.attn.to_q, m.attn.to_k, m.attn.to_v)])
    out = F.scaled_dot_product_attention(*(qkv.select(0, which) for which in range(3)))
    return out.transpose(1, 2).flatten(2)[:, text.shape[1] :]


def written_by_hand(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1)
    q, k, v = (heads(linear(joint)) for linear in (m.attn.to_q, m.attn.to_k, m.attn.to_v))
    return ((q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v).transpose(1, 2).flatten(2)[:, text.shape[1] :]


def einsum_projection(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1)
    weights = (linear.weight.unflatten(0, (HEADS, -1)) for linear in (m.attn.to_q, m.attn.to_k, m.attn.to_v))
    q, k, v = (torch.einsum("bsc,hdc->bhsd", joint, weight) for weight in weights)
    return F.scaled_dot_product_attention(q, k, v)[:, :, text.shape[1] :]


def multi_head_attention(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1)
    joint = joint + m.mha(joint, joint, joint, need_weights=False)[0]
    return m.attn(joint)[:, text.shape[1] :]


def text_modulated_by_video(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    text = text * video.mean(1, keepdim=True)
    return m.attn(torch.cat([text, video], 1))[:, text.shape[1] :]


def padded_text(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    text = torch.cat([text, video.new_zeros(video.shape[0], 3, DIM)], 1)
    return m.attn(torch.cat([text, video], 1))[:, text.shape[1] :]


def register_tokens(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    registers = m.registers.expand(video.shape[0], -1, -1)
    return m.attn(torch.cat([text, registers, video], 1))[:, text.shape[1] + 4 :]


def frames_and_text(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """The text is one more frame of the video until both are flattened."""
    frames = video.unflatten(1, (-1, 2))
    joint = torch.cat([text.unflatten(1, (-1, 2)), frames], 1).flatten(1, 2)
    return m.attn(joint)[:, text.shape[1] :]


def filled_buffer(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = video.new_zeros(video.shape[0], text.shape[1] + video.shape[1], DIM)
    joint[:, : text.shape[1]] = text
    joint[:, text.shape[1] :] = video
    return m.attn(joint)[:, text.shape[1] :]


def copied_into_a_buffer(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = video.new_zeros(video.shape[0], text.shape[1] + video.shape[1], DIM)
    joint[:, : text.shape[1]].copy_(text)
    joint[:, text.shape[1] :].add_(video)
    return m.attn(joint)[:, text.shape[1] :]


def copied_last_into_a_buffer(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = video.new_zeros(video.shape[0], video.shape[1] + text.shape[1], DIM)
    joint[:, : video.shape[1]].copy_(video)
    joint[:, video.shape[1] :].copy_(text)
    return m.attn(joint)[:, : video.shape[1]]


def copied_into_a_view(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """Not followed: that the rest is dropped after the attention tells what is text."""
    joint = video.new_zeros(video.shape[0], text.shape[1] + video.shape[1], DIM)
    joint.narrow(1, 0, text.shape[1]).copy_(text)
    joint.narrow(1, text.shape[1], video.shape[1]).copy_(video)
    return video + m.attn(joint)[:, text.shape[1] :]


def unknown_function_before(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """Padding is not followed; the split after the attention and the residual tell what is what."""
    joint = F.pad(torch.cat([text, video], 1), (0, 0, 0, 8))
    return video + m.attn(joint)[:, text.shape[1] : text.shape[1] + video.shape[1]]


def unknown_function_and_two_residuals(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1).flip(1)
    last, first = m.attn(joint).split([video.shape[1], text.shape[1]], dim=1)
    return torch.cat([first + text, last + video], 1)


FIRST, LAST = [(0, TEXT)], [(VIDEO, VIDEO + TEXT)]
LAYOUTS: dict[Layout, list[list[tuple[int, int]]]] = {
    cat_before_projection: [FIRST],
    cat_and_split: [FIRST],
    text_last: [LAST],
    stacked_horizontally: [LAST],
    stacked_vertically: [FIRST],
    padded_and_added: [LAST],
    padded_channels: [FIRST],
    text_on_both_sides: [[(0, TEXT), (TEXT + VIDEO, 2 * TEXT + VIDEO)]],
    cat_before_rope: [FIRST],
    cat_after_rope: [FIRST],
    rope_in_place: [FIRST],
    complex_rope: [FIRST],
    many_blocks_later: [FIRST, FIRST],
    fused_projection: [FIRST],
    stacked_projections: [FIRST],
    written_by_hand: [FIRST],
    einsum_projection: [FIRST],
    multi_head_attention: [FIRST, FIRST],
    text_modulated_by_video: [FIRST],
    padded_text: [[(0, TEXT + 3)]],
    register_tokens: [FIRST],
    frames_and_text: [FIRST],
    filled_buffer: [FIRST],
    copied_into_a_buffer: [FIRST],
    copied_last_into_a_buffer: [LAST],
    copied_into_a_view: [FIRST],
    unknown_function_before: [[(0, TEXT), (TEXT + VIDEO, TEXT + VIDEO + 8)]],
    unknown_function_and_two_residuals: [LAST],
}


def example(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.ones(batch, VIDEO, DIM), torch.ones(batch, TEXT, DIM)


def find(model: Callable[..., Any], *args: Any, **kwargs: Any) -> list[AttentionSite]:
    gm = capture(model, *args, **kwargs)
    return find_joint_tokens(gm, find_attention(gm), None)


def ranges(site: AttentionSite) -> list[tuple[int | None, ...]]:
    assert isinstance(site.protection, Protection), site.protection
    return [tuple(size_hint(size_value(size)) for size in pair) for pair in site.protection.ranges]


def declined(site: AttentionSite) -> Declined:
    assert isinstance(site.protection, Declined), site.protection
    return site.protection


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_text_is_found(layout: Layout, dynamic: bool) -> None:
    assert [ranges(site) for site in find(Joint(layout), *example(), dynamic=dynamic)] == LAYOUTS[layout]


def overwritten_buffer(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """What is written last counts, as far as there is room."""
    joint = torch.cat([text, text, video], 1)
    joint[:, text.shape[1] : text.shape[1] + 5] = video[:, :5]
    joint[:, -2:10000] = text[:, :2]
    return m.attn(joint)


def test_what_is_written_over_other_tokens_counts() -> None:
    (site,) = find(Joint(overwritten_buffer), *example())
    assert ranges(site) == [(0, TEXT), (TEXT + 5, 2 * TEXT), (2 * TEXT + VIDEO - 2, 2 * TEXT + VIDEO)]


def test_a_buffer_of_scattered_tokens_stays_dense() -> None:
    def scattered(m: Joint, video: Tensor, text: Tensor) -> Tensor:
        joint = video.new_zeros(video.shape[0], TEXT + VIDEO, DIM)
        joint.index_copy_(1, torch.arange(TEXT), text)
        joint.index_copy_(1, torch.arange(TEXT, TEXT + VIDEO), video)
        return m.attn(joint)

    (site,) = find(Joint(scattered), *example())
    assert declined(site).reason is Reason.JOINT
    assert "index_copy_" in declined(site).detail


@pytest.mark.parametrize("layout", [text_last, many_blocks_later, frames_and_text, unknown_function_before])
def test_positions_are_symbolic_and_finding_them_adds_no_guard(layout: Layout) -> None:
    gm = capture(Joint(layout), *example(), dynamic=True)
    shape_env = fake_mode(gm).shape_env
    assert shape_env is not None
    sites = find_attention(gm)
    guards = len(shape_env.guards)
    for site in find_joint_tokens(gm, sites, None):
        assert isinstance(site.protection, Protection)
        assert not isinstance(site.protection.ranges[0][1], int)
    assert len(shape_env.guards) == guards


def video_alone(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(video) + text.mean(1, keepdim=True)


def text_in_every_token(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """Text that is concatenated along the channels makes no tokens of its own."""
    both = torch.cat([video, text.repeat(1, 3, 1)[:, : video.shape[1]]], dim=-1)
    return m.attn(F.linear(both, m.fused.weight[:DIM].repeat(1, 2)))


def text_in_every_channel(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(m.conv(torch.cat([video[:, :TEXT], text], 1)))


def cross_attention_first(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(video + m.added(video, text))


def registers_alone(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat([m.registers.expand(video.shape[0], -1, -1), video], 1))[:, 4:]


def separated_before(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    """The concatenation is undone before the attention."""
    return m.attn(m.norm(torch.cat([text, video], 1))[:, text.shape[1] :])


@pytest.mark.parametrize(
    "layout",
    [
        video_alone,
        text_in_every_token,
        text_in_every_channel,
        cross_attention_first,
        registers_alone,
        separated_before,
    ],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_attention_over_latents_alone_needs_no_protection(layout: Layout, dynamic: bool) -> None:
    for site in find(Joint(layout), *example(), dynamic=dynamic):
        assert site.protection == Protection()


def test_attention_over_text_alone_is_dense_by_design() -> None:
    refiner, joint = find(Joint(refined_text), *example())
    assert declined(refiner) == Declined(Reason.TEXT)
    assert Reason.TEXT.by_design
    assert ranges(joint) == FIRST


def shuffled(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    joint = torch.cat([text, video], 1)
    return m.attn(joint[:, torch.arange(joint.shape[1] - 1, -1, -1)])


def picked_samples(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat([text, video], 1)[[1, 0]])


def keys_in_another_order(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    q, k = heads(m.attn.to_q(torch.cat([text, video], 1))), heads(m.attn.to_k(torch.cat([video, text], 1)))
    return F.scaled_dot_product_attention(q, k, k)


def joint(moved: Callable[[Tensor], Tensor]) -> Layout:
    return lambda m, video, text: m.attn(moved(torch.cat([text, video], 1)))


def copied_into_parts(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    whole = video.new_zeros(video.shape[0], TEXT + VIDEO, DIM)
    first, last = whole.split([TEXT, VIDEO], dim=1)
    first.copy_(text)
    last.copy_(video)
    return m.attn(whole)


def written_through_a_view(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    whole = video.new_zeros(video.shape[0], TEXT + VIDEO, DIM)
    whole.mT[..., :TEXT] = text.mT
    whole.mT[..., TEXT:] = video.mT
    return m.attn(whole)


def chosen(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    padded = F.pad(text, (0, 0, 0, VIDEO - TEXT))
    return m.attn(torch.where((torch.arange(VIDEO) < TEXT)[:, None], padded, video))


def scattered_slice(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.slice_scatter(video, text, 1, VIDEO - TEXT, VIDEO))


def text_in_five_places(m: Joint, video: Tensor, text: Tensor) -> Tensor:
    return m.attn(torch.cat([part for piece in text[:, :5].split(1, 1) for part in (piece, video)], 1))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (shuffled, "getitem"),
        (picked_samples, "getitem"),
        (joint(torch.fliplr), "fliplr"),
        (joint(lambda x: torch.flipud(x.transpose(0, 1)).transpose(0, 1)), "flipud"),
        (joint(lambda x: torch.channel_shuffle(x, 2)), "channel_shuffle"),
        (joint(lambda x: x.as_strided(x.shape, (DIM, 2 * DIM, 1))), "as_strided"),
        (joint(lambda x: F.pad(x, (0, 0, -5, 5))), "pad"),
        (joint(lambda x: F.embedding(torch.arange(TEXT + VIDEO - 1, -1, -1), x[0])[None]), "embedding"),
        (joint(lambda x: x.index_put((torch.arange(2)[:, None], torch.arange(TEXT + VIDEO).flip(0)), x)), "index_put"),
        (joint(lambda x: torch.eye(TEXT + VIDEO).flip(0) @ x), "matmul"),
        (joint(lambda x: torch.einsum("ij,bjc->bic", torch.eye(TEXT + VIDEO).flip(0), x)), "einsum"),
        (copied_into_parts, "copy_"),
        (written_through_a_view, "setitem"),
        (chosen, "where"),
        (scattered_slice, "slice_scatter"),
        (keys_in_another_order, "q and k"),
        (text_in_five_places, "5 places"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_joint_layouts_that_cannot_be_told_are_declined(layout: Layout, words: str) -> None:
    (site,) = find(Joint(layout), *example())
    reason, detail = declined(site)
    assert reason is Reason.JOINT
    assert words in detail
    assert "'protect': [(start, end)]" in detail


def test_an_input_of_unknown_meaning_is_told_by_the_split_before_the_result() -> None:
    model = Joint(cat_before_projection)

    def dropped(hidden_states: Tensor, y: Tensor) -> Tensor:
        return model(hidden_states, y)

    def kept(hidden_states: Tensor, y: Tensor) -> Tensor:
        return model.attn(torch.cat([y, hidden_states], 1))

    (site,) = find(dropped, *example())
    assert ranges(site) == FIRST
    (site,) = find(kept, *example())
    assert declined(site).reason is Reason.JOINT
    assert "may be text" in declined(site).detail


@pytest.mark.parametrize("name", ["txt", "prompt_embeds", "context", "cap_feats", "encoder_hidden_states_t5"])
def test_names_of_text(name: str) -> None:
    attention = Attention()

    def model(hidden_states: Tensor, **conditions: Tensor) -> Tensor:
        return attention(torch.cat([hidden_states, conditions[name]], 1))

    video, text = example()
    (site,) = find(model, video, **{name: text})
    assert ranges(site) == LAST


def test_text_beside_an_unnamed_input_is_enough() -> None:
    attention = Attention()

    def model(y: Tensor, context: Tensor) -> Tensor:
        return attention(torch.cat([y, context], 1))

    (site,) = find(model, *example())
    assert ranges(site) == LAST


def test_the_place_of_the_concatenation_is_described() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Joint(cat_before_projection)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self.block(hidden_states, encoder_hidden_states)

    (site,) = find(Block(), *example())
    assert isinstance(site.protection, Protection)
    assert site.protection.found == "text: cat in block"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", JOINT_MODELS)
def test_text_in_diffusers_models(name: str, dynamic: bool) -> None:
    model, arguments, expected = JOINT_MODELS[name]()
    assert {site.layer: protected(site) for site in find(model, dynamic=dynamic, **arguments)} == expected


def protected(site: AttentionSite) -> Reason | list[tuple[int | None, ...]]:
    return site.protection.reason if isinstance(site.protection, Declined) else ranges(site)
