"""Repeated heads of k and v are read where they were before, and the copies go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import DIM, HEADS, OPTIONS, Denoiser, capture, inputs, run_both
from test_insert_step_guard import lines_with
from torch import Tensor, nn

from lite_compile.backend import rewrite_graph

KV_HEADS, TIMES, WIDTH = 2, 3, DIM // HEADS
Repeat = Callable[[Tensor], Tensor]


class Grouped(nn.Module):
    """Six heads of q and two of k and v; `repeat` brings `[B, S, 2, D]` to `[B, 6, S, D]`."""

    def __init__(self, repeat: Repeat, repeat_v: Repeat | None = None) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, KV_HEADS * TIMES * WIDTH)
        self.to_k, self.to_v = (nn.Linear(DIM, KV_HEADS * WIDTH) for _ in range(2))
        self.to_out = nn.Linear(KV_HEADS * TIMES * WIDTH, DIM)
        self.repeat, self.repeat_v = repeat, repeat_v or repeat

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, WIDTH)) for project in (self.to_q, self.to_k, self.to_v))
        out = self.attend(q.transpose(1, 2), self.repeat(k), self.repeat_v(v))
        result: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return result

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Written(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v


def expanded(x: Tensor) -> Tensor:
    batch, length, heads, width = x.shape
    x = x.transpose(1, 2)[:, :, None].expand(batch, heads, TIMES, length, width)
    return x.reshape(batch, heads * TIMES, length, width)


def written_to(x: Tensor) -> Tensor:
    repeated = x.transpose(1, 2).repeat_interleave(TIMES, 1)
    x.mul_(2.0)
    return repeated


SEEN_THROUGH: dict[str, Repeat] = {
    "interleave": lambda x: x.transpose(1, 2).repeat_interleave(TIMES, 1),
    "interleave_from_the_end": lambda x: x.transpose(1, 2).repeat_interleave(TIMES, dim=-3),
    "interleave_first": lambda x: torch.repeat_interleave(x, TIMES, dim=2).permute(0, 2, 1, 3).contiguous(),
    "expand": expanded,
    "repeat": lambda x: x.unsqueeze(3).repeat(1, 1, 1, TIMES, 1).flatten(2, 3).transpose(1, 2),
}
NOT_SEEN_THROUGH: dict[str, Repeat] = {
    "another_order": lambda x: x.transpose(1, 2).repeat(1, TIMES, 1, 1),
    "another_order_expanded": lambda x: (
        x.transpose(1, 2)[:, None].expand(-1, TIMES, -1, -1, -1).reshape(x.shape[0], -1, x.shape[1], WIDTH)
    ),
    "written_to": written_to,
}


def grouped(attention: nn.Module) -> Denoiser:
    model = Denoiser()
    model.attn = attention  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("kind", [Grouped, Written])
@pytest.mark.parametrize("name", [*SEEN_THROUGH, *NOT_SEEN_THROUGH])
def test_result_is_that_of_the_dense_attention(name: str, kind: type[Grouped]) -> None:
    repeat = {**SEEN_THROUGH, **NOT_SEEN_THROUGH}[name]
    dense, sparse = run_both(grouped(kind(repeat)), batch=2)
    torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("kind", [Grouped, Written])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_the_copies_disappear(name: str, dynamic: bool, kind: type[Grouped]) -> None:
    model = grouped(kind(SEEN_THROUGH[name]))
    gm, _, report = rewrite_graph(capture(model, *inputs(batch=2), dynamic=dynamic), OPTIONS)
    (site,) = report.sites
    assert site.rewritten, str(report)
    assert (site.q_shape[1], site.k_shape[1]) == (KV_HEADS * TIMES, KV_HEADS)
    text = lines_with(gm, "")
    assert "repeat" not in text.replace("self_dict", "")
    assert ".expand(" not in text


@pytest.mark.parametrize("repeats", [(expanded, written_to), *((repeat,) for repeat in NOT_SEEN_THROUGH.values())])
def test_what_is_not_seen_through_is_rewritten_with_its_copies(repeats: tuple[Repeat, ...]) -> None:
    _, _, report = rewrite_graph(capture(grouped(Grouped(*repeats)), *inputs(batch=2)), OPTIONS)
    (site,) = report.sites
    assert site.rewritten, str(report)
    assert (site.q_shape[1], site.k_shape[1]) == (KV_HEADS * TIMES, KV_HEADS * TIMES)


def test_copies_that_something_else_uses_stay() -> None:
    class Used(Grouped):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().attend(q, k, v) + k.mean()

    dense, sparse = run_both(grouped(Used(SEEN_THROUGH["interleave"])), batch=2)
    torch.testing.assert_close(sparse, dense)
