"""Which masks are the same for all heads and queries, and that the compiled model honours them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import DIM, HEADS, OPTIONS, TOKENS, Denoiser, capture, random_inputs
from test_insert_step_guard import lines_with
from torch import Tensor, nn

import lite_compile
from lite_compile import Reason, clear_report, report
from lite_compile.backend import rewrite_graph

BATCH = 2
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOWEST = torch.finfo(torch.float32).min


class Padded(nn.Module):
    """A denoiser that gets a mask `[B, S]`, True where a token is to be attended to."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.denoiser = Denoiser(lambda q, k, v: attend(q, k, v, self.mask))

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
        self.mask = mask
        try:
            return self.denoiser(hidden_states, timestep, prompt)
        finally:
            del self.mask


def sdpa(make_mask: Callable[[Tensor], Tensor]) -> Attend:
    return lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=make_mask(mask))


def written(hide: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    """Hand-written attention whose scores go through `hide`."""
    return lambda q, k, v, mask: hide(q @ k.mT * 0.25, mask).softmax(-1) @ v


def additive(mask: Tensor, lowest: float = LOWEST) -> Tensor:
    return (1.0 - mask.float()) * lowest


def keys(mask: Tensor) -> Tensor:
    return mask[:, None, None, :]


def lengths(*counts: int) -> Tensor:
    """bool `[B, S]`: so many tokens of each batch entry are real."""
    return torch.arange(TOKENS) < torch.tensor(counts)[:, None]


MASK = lengths(TOKENS, 41)
HONOURED: dict[str, Attend] = {
    "bool": sdpa(keys),
    "bool_unsqueezed": sdpa(lambda mask: mask.unsqueeze(1).unsqueeze(1)),
    "bool_viewed": sdpa(lambda mask: mask.view(BATCH, 1, 1, -1)),
    "bool_expanded": sdpa(lambda mask: keys(mask).expand(-1, HEADS, TOKENS, -1)),
    "bool_repeated": sdpa(lambda mask: keys(mask).repeat(1, HEADS, TOKENS, 1)),
    "expanded_copy": sdpa(lambda mask: ~(~keys(mask)).expand(-1, HEADS, TOKENS, -1).contiguous()),
    "expanded_and_unsqueezed": sdpa(lambda mask: mask[:, None].repeat(1, TOKENS, 1).unsqueeze(1)),
    "one_row": sdpa(lambda mask: mask[1:]),
    "one_head": sdpa(lambda mask: mask[1:, None]),
    "batch_of_one": sdpa(lambda mask: keys(mask[1:])),
    "additive": sdpa(lambda mask: keys(additive(mask))),
    "additive_after_expansion": sdpa(lambda mask: additive(keys(mask).expand(-1, HEADS, TOKENS, -1))),
    "additive_infinite": sdpa(lambda mask: keys(torch.zeros(BATCH, TOKENS).masked_fill(~mask, -math.inf))),
    "additive_10000": sdpa(lambda mask: keys(additive(mask, -10000.0))),
    "additive_small": sdpa(lambda mask: keys(additive(mask, -1.5))),
    "zeros": sdpa(lambda mask: torch.zeros(BATCH, 1, TOKENS, TOKENS)),
    "zeros_of_rows": sdpa(lambda mask: torch.zeros(TOKENS, TOKENS)),
    "constant_of_rows": sdpa(lambda mask: torch.full((TOKENS, TOKENS), 0.5)),
    "written_sum": written(lambda scores, mask: scores + keys(additive(mask))),
    "written_sum_for_all": written(lambda scores, mask: scores + additive(mask[1])),
    "written_sum_reversed": written(lambda scores, mask: keys(additive(mask)) + scores),
    "written_fill_zero": written(lambda scores, mask: scores.masked_fill(keys(mask) == 0, -math.inf)),
    "written_fill_not": written(lambda scores, mask: scores.masked_fill(~keys(mask), -1e9)),
    "written_fill_lowest": written(lambda scores, mask: scores.masked_fill(~keys(mask), torch.finfo(scores.dtype).min)),
    "written_where": written(lambda scores, mask: torch.where(keys(mask), scores, -1e4)),
    "written_where_not": written(lambda scores, mask: torch.where(~keys(mask), -1e9, scores)),
    "written_where_method": written(lambda scores, mask: scores.where(keys(mask), -math.inf)),
    "written_sum_before_the_scale": lambda q, k, v, mask: (
        (q @ k.mT + keys(additive(mask, -4.0))) / 4 + keys(additive(mask, -0.5))
    ).softmax(-1) @ v,
    "written_fill_before_the_scale": lambda q, k, v, mask: (
        (q @ k.mT).masked_fill(~keys(mask), -1e9) * 0.25
    ).softmax(-1) @ v,
    "baddbmm": lambda q, k, v, mask: (
        (torch.baddbmm(mask[1].float(), q.flatten(0, 1), k.flatten(0, 1).mT, beta=3, alpha=0.5) * 0.5).softmax(-1)
        @ v.flatten(0, 1)
    ).view(q.shape),
    "repeated_for_folded_heads": lambda q, k, v, mask: (
        torch.baddbmm(additive(mask[1:, None]).repeat_interleave(HEADS, dim=0), q[0], k[0].mT, alpha=0.25).softmax(-1)
        @ v[0]
    ).expand(q.shape),
    "nothing_is_visible": sdpa(lambda mask: torch.zeros(BATCH, 1, 1, TOKENS, dtype=torch.bool)),
    "nothing_is_visible_of_one": written(lambda scores, mask: scores.masked_fill(~keys(mask & (len(mask) > 2)), -1e9)),
    "filled_twice": written(
        lambda scores, mask: scores.masked_fill(~keys(mask), -1e9).masked_fill(keys(mask), -1e9)
    ),
    "filled_with_less_last": written(
        lambda scores, mask: scores.masked_fill(~keys(mask), -math.inf).masked_fill(keys(mask), -1e9)
    ),
    "filled_with_less_first": written(
        lambda scores, mask: scores.masked_fill(keys(mask), -1e9).masked_fill(keys(lengths(9, 9)), -math.inf)
    ),
    "filled_over_a_sum": written(
        lambda scores, mask: (scores + keys(additive(mask, -1e30))).masked_fill(keys(mask.new_ones(mask.shape)), -1e9)
    ),
    "written_twice": written(lambda scores, mask: (scores + keys(additive(mask, -2.0))).masked_fill(~keys(mask), -1e9)),
}  # fmt: skip
DECLINED: dict[str, tuple[Attend, str]] = {
    "rows": (sdpa(lambda mask: mask[:, None, None, :] & mask[:, None, :, None]), "differs between rows"),
    "rows_and_not_batch": (sdpa(lambda mask: mask[1][:, None].expand(-1, TOKENS)), "differs between rows"),
    "causal": (sdpa(lambda mask: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()), "differs between rows"),
    "heads": (sdpa(lambda mask: mask[:, None]), "differs between heads"),
    "heads_of_batch": (sdpa(lambda mask: mask[None, :, None]), "differs between heads"),
    "one_key": (sdpa(lambda mask: mask[:, :1, None, None]), "its shape is"),
    "causal_fill": (
        written(lambda scores, mask: scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1) == 1, -1e9)),
        "differs between rows",
    ),
    "fill_that_hides_nothing": (
        written(lambda scores, mask: scores.masked_fill(~keys(mask), -5.0)), "masked_fill masks the scores",
    ),
    "fill_that_hides_nothing_once_scaled": (
        lambda q, k, v, mask: ((q @ k.mT).masked_fill(~keys(mask), -1e4) * 0.001).softmax(-1) @ v, "masks the scores",
    ),
    "fill_that_is_turned_around": (
        lambda q, k, v, mask: ((q @ k.mT).masked_fill(~keys(mask), -1e9) * -0.25).softmax(-1) @ v, "masks the scores",
    ),
    "sum_before_a_scale_that_is_computed": (
        lambda q, k, v, mask: ((q @ k.mT + keys(additive(mask, -4.0))) * v.mean()).softmax(-1) @ v,
        "adds to the scores",
    ),
    "sum_of_bools": (written(lambda scores, mask: scores + keys(mask)), "adds to the scores"),
    "filled_with_different_numbers": (
        written(lambda scores, mask: scores.masked_fill(~keys(mask), -1e9).masked_fill(keys(mask), -1e4)),
        "different numbers",
    ),
    "sum_with_what_was_filled": (
        written(lambda scores, mask: scores.masked_fill(~keys(mask), -1e9) + keys(additive(mask, 1e9))),
        "takes the place of scores",
    ),
    "heads_after_rows": (
        lambda q, k, v, mask: torch.einsum(
            "bqhk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bqhk", q, k) + keys(additive(mask))).softmax(-1), v
        ),
        "last dimensions",
    ),
}  # fmt: skip


WRITES: dict[str, Callable[[Tensor], object]] = {
    "item": lambda mask: mask[:, :, :5, :7].fill_(-10.0),
    "sum": lambda mask: mask.add_(torch.ones(TOKENS, TOKENS).tril()),
    "sum_as_method": lambda mask: mask.__iadd__(torch.ones(TOKENS, TOKENS).tril()),
    "sum_as_output": lambda mask: torch.add(mask, torch.ones(TOKENS, TOKENS).tril(), out=mask),
    "flat_view": lambda mask: mask.float().view(-1)[:7].fill_(-10.0),
    "diagonal": lambda mask: mask.diagonal(dim1=-2, dim2=-1).fill_(-10.0),
    "transposed": lambda mask: mask.mT[..., :5].fill_(-10.0),
    "selected_row": lambda mask: mask.select(2, 3).fill_(-10.0),
    "one_of_many": lambda mask: mask.unbind(2)[3].fill_(-10.0),
    "half": lambda mask: mask.chunk(2, 2)[0].fill_(-10.0),
}


@pytest.mark.parametrize("start", ["zeros", "expanded"])
@pytest.mark.parametrize("name", WRITES)
def test_a_mask_that_is_written_to_stays_dense(name: str, start: str) -> None:
    def make(mask: Tensor) -> Tensor:
        whole = keys(additive(mask)).expand(-1, 1, TOKENS, -1).clone()
        made = torch.zeros_like(whole) if start == "zeros" else whole
        WRITES[name](made)
        return made

    (site,) = rewrite_graph(capture(Padded(sdpa(make)), *arguments()), OPTIONS)[2].sites
    assert site.reason is Reason.MASK
    assert "differs between rows" in site.detail


def arguments() -> tuple[Tensor, ...]:
    return *random_inputs(batch=BATCH), MASK


@pytest.mark.parametrize("name", HONOURED)
def test_result_is_that_of_the_dense_attention(name: str) -> None:
    torch.manual_seed(0)
    model = Padded(HONOURED[name]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    torch._dynamo.reset()
    clear_report()
    options = {"inner": "eager", "min_seq_len": 1, "threshold": -math.inf}
    with torch.no_grad():
        sparse = torch.compile(model, backend="liteattention", fullgraph=True, options=options)
        torch.testing.assert_close(sparse(*arguments()), model(*arguments()))
    assert [site.rewritten for site in report()] == [True], str(report())


@pytest.mark.parametrize("name", DECLINED)
def test_what_stays_dense(name: str) -> None:
    attend, detail = DECLINED[name]
    gm = capture(Padded(attend), *arguments())
    rewritten, _, found = rewrite_graph(gm, OPTIONS)
    assert rewritten is gm
    (site,) = found.sites
    assert site.reason is Reason.MASK
    assert detail in site.detail


def block_in_turn(timestep: Tensor) -> Tensor:
    """All keys but a block of them, another one at each step."""
    return keys(torch.arange(TOKENS) // 8 != timestep[:, None] // 100)


def written_in_turn(timestep: Tensor) -> Tensor:
    mask = torch.zeros(BATCH, 1, 1, TOKENS)
    mask[..., :8] = timestep[:, None, None, None]
    return mask


@pytest.mark.parametrize(
    "make", [block_in_turn, written_in_turn, lambda timestep: block_in_turn(timestep).to(timestep)]
)
def test_a_mask_that_changes_from_step_to_step_stays_dense(make: Callable[[Tensor], Tensor]) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded = Padded(sdpa(lambda mask: mask))

        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return self.padded(hidden_states, timestep, prompt, make(timestep))

    (site,) = rewrite_graph(capture(Changing(), *random_inputs(batch=BATCH)), OPTIONS)[2].sites
    assert site.reason is Reason.MASK
    assert site.detail == "changes with 'timestep' from step to step"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_may_take_shape_and_dtype_from_latents(dynamic: bool) -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padded = Padded(sdpa(lambda mask: mask))

        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            ones = hidden_states.new_ones(hidden_states.shape[:2]) * hidden_states.shape[1]
            mask = torch.where(prompt[..., 0] > 0, ones, torch.zeros_like(hidden_states)[..., 0]).type_as(hidden_states)
            return self.padded(hidden_states, timestep, prompt, keys(mask))

    (site,) = rewrite_graph(capture(Shaped(), *random_inputs(batch=BATCH), dynamic=dynamic), OPTIONS)[2].sites
    assert site.rewritten, str(site)


@pytest.mark.parametrize("make", [keys, lambda mask: keys(additive(mask))], ids=["bool", "additive"])
def test_lengths_may_be_symbols(make: Callable[[Tensor], Tensor]) -> None:
    _, state, found = rewrite_graph(capture(Padded(sdpa(make)), *arguments(), dynamic=True), OPTIONS)
    assert [site.rewritten for site in found.sites] == [True], str(found)
    assert isinstance(state.layers[0].k_len, torch.SymInt)


def test_a_mask_that_is_being_learned_stays_dense() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 1, 1, TOKENS))
            self.denoiser = Denoiser(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, self.bias))
            self.denoiser.requires_grad_(False)

        def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
            return self.denoiser(hidden_states, timestep, prompt)

    (site,) = rewrite_graph(capture(Learned(), *random_inputs(), grad=True), OPTIONS)[2].sites
    assert site.reason is Reason.GRAD
    (site,) = rewrite_graph(capture(Learned(), *random_inputs()), OPTIONS)[2].sites
    assert site.rewritten


def test_text_of_a_rewritten_graph() -> None:
    gm, _, _ = rewrite_graph(capture(Padded(sdpa(keys)), *arguments()), OPTIONS)
    text = lines_with(gm, "")
    assert_expected_inline(
        text[text.index("getitem_3 = ") : text.index("getitem_4 = ")].rstrip(),
        """\
getitem_3 = getitem_2[(slice(None, None, None), 0, 0)]
logical_not = getitem_3.logical_not()
zeros_like = torch.zeros_like(logical_not, dtype = torch.float32)
masked_fill = zeros_like.masked_fill(logical_not, -inf)
attend_default = torch.ops.lite_compile.attend.default(q, k, v, lite_state_0, now, 0.25, threshold_0, 128, 64, True, key_bias = masked_fill)""",  # noqa: E501
    )


class Local(nn.Module):
    """A denoiser whose queries and keys are near each other, so that tiles become negligible."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Padded(sdpa(keys))
        angles = torch.arange(1024)[:, None] * torch.rand(DIM // 2) * 0.02
        self.register_buffer("where", 6 * torch.cat([angles.cos(), angles.sin()], -1))
        attention = self.denoiser.denoiser.attn
        for projection in (attention.to_q, attention.to_k):
            nn.init.eye_(projection.weight)

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
        return self.denoiser(hidden_states + self.where, timestep, prompt, mask)


def test_masks_of_one_padding_are_not_used_with_another() -> None:
    torch.manual_seed(0)
    model = Local().eval()
    noise = torch.randn(1, 1024, DIM)
    paddings = [torch.arange(1024)[None] < real for real in (700, 1024)]
    options = {"inner": "eager", "min_seq_len": 64, "threshold": -6.0}

    @torch.no_grad()
    def generate(compiled: Any, padding: Tensor) -> list[Tensor]:
        results = []
        for step in range(4):
            latents = noise * (1 - step / 8)
            results.append(compiled(latents, torch.full((1,), 1000.0 - 100 * step), latents, padding))
        return results

    def fresh() -> Any:
        torch._dynamo.reset()
        lite_compile.reset(model)
        return torch.compile(model, backend="liteattention", fullgraph=True, options=options)

    alone = [generate(fresh(), padding) for padding in paddings]
    assert lite_compile.stats(model).density < 0.95
    compiled = fresh()
    for number in (0, 1, 0):
        together = generate(compiled, paddings[number])
        assert all(torch.equal(a, b) for a, b in zip(together, alone[number], strict=True))
    # In the middle of a generation, too: what was dropped under one padding is looked at under the other.
    with torch.no_grad():
        generate(compiled, paddings[0])
        swapped = compiled(noise * 0.4, torch.full((1,), 550.0), noise * 0.4, paddings[1])
        dense = model(noise * 0.4, torch.full((1,), 550.0), noise * 0.4, paddings[1])
    torch.testing.assert_close(swapped, dense)
