"""What looks like RMS norm and rotary embedding and is something else stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_passes import noise
from rotary_models import (
    BATCH,
    DIM,
    EPS,
    HEADS,
    TOKENS,
    Rotate,
    added,
    arguments,
    as_one_head,
    assert_same,
    over_tokens,
    run_fused,
    tables,
    written,
)
from torch import Tensor


def assert_left_alone(function: Callable[..., Any], *args: Any, grad: bool = False) -> None:
    """Also where its operands are written to, which is done to copies."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in args]
    with torch.set_grad_enabled(grad):
        expected = function(*copies)
    outcome = run_fused(function, *args, grad=grad)
    assert outcome.fused == 0
    assert outcome.is_unchanged
    assert outcome.guards == 0
    assert_same(outcome.result, expected)


def halves(
    first: Callable[..., Tensor] = lambda even, odd, cos, sin: even * cos - odd * sin,
    second: Callable[..., Tensor] = lambda even, odd, cos, sin: even * sin + odd * cos,
    slices: tuple[slice, slice] = (slice(0, None, 2), slice(1, None, 2)),
    empty: Callable[[Tensor], Tensor] = torch.empty_like,
) -> Rotate:
    """`written` with another part; the default is fused, as `test_these_differ_in_one_thing` says."""

    def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[..., 0::2], sin[..., 1::2]
        out = empty(y)
        out[..., slices[0]] = first(even, odd, cos, sin)
        out[..., slices[1]] = second(even, odd, cos, sin)
        return out.type_as(y)

    return rotate


def between(
    after_norm: Callable[..., Any] = lambda *_: None,
    after_empty: Callable[..., Any] = lambda *_: None,
    after_first: Callable[..., Any] = lambda *_: None,
    result: Callable[..., Any] = lambda x, y, even, odd, cos, sin, out: out,
) -> Callable[..., Any]:
    """The whole, with something done in the middle."""

    def spelled(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        x, parts = x * 1, (cos[..., 0::2], sin[..., 1::2])
        y = F.rms_norm(x, (HEADS * DIM,), weight, EPS).unflatten(2, (HEADS, -1))
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        after_norm(x, y, even, odd, weight, cos, sin)
        out = torch.empty_like(y)
        after_empty(x, y, even, odd, weight, cos, sin)
        out[..., 0::2] = even * parts[0] - odd * parts[1]
        extra = after_first(x, y, even, odd, cos, sin, out)
        out[..., 1::2] = even * parts[1] + odd * parts[0]
        found = result(x, y, even, odd, cos, sin, out)
        return found if extra is None else (found, extra)

    return spelled


def combined(
    stacked: Callable[[Tensor, Tensor], Tensor] = lambda even, odd: torch.stack([-odd, even], -1),
    total: Callable[..., Tensor] = lambda y, swapped, cos, sin: y.float() * cos + swapped.float() * sin,
    cast: Callable[[Tensor, Tensor], Any] = lambda total, y: total.to(y.dtype),
    unbind: Callable[[Tensor], tuple[Tensor, ...]] = lambda y: y.unflatten(-1, (-1, 2)).unbind(-1),
) -> Rotate:
    """`added` with another part."""

    def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Any:
        even, odd = unbind(y)
        return cast(total(y, stacked(even, odd).flatten(-2), cos, sin), y)

    return rotate


def test_these_differ_in_one_thing_from_what_is_fused() -> None:
    for function in (over_tokens(halves()), between(), over_tokens(combined())):
        for dtype in (torch.float32, torch.bfloat16):
            args = arguments(dtype)
            outcome = run_fused(function, *args)
            assert outcome.fused == 1
            assert not outcome.is_unchanged
            assert_same(outcome.result, function(*args))


def in_order(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads before tokens."""
    return written(y.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2))


def by_halves(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of a head against the second."""
    first, second = y.chunk(2, -1)
    return (y.float() * cos + torch.cat([-second, first], -1).float() * sin).type_as(y)


def partly(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Only the first half of a head."""
    narrow = DIM // 2
    return torch.cat([written(y[..., :narrow], cos[..., :narrow], sin[..., :narrow]), y[..., narrow:]], -1)


def twice(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The even half is written twice, and the second time counts."""
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    out, cos, sin = torch.empty_like(y), cos[..., 0::2], sin[..., 1::2]
    out[..., 0::2] = even * cos - odd * sin
    out[..., 0::2] = even * sin - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def complex_numbers(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(y.float().unflatten(-1, (-1, 2)))
    angles = torch.complex(cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2).type_as(y)


ROTATIONS: dict[str, Rotate] = {
    "other_sign": halves(lambda e, o, c, s: e * c + o * s, lambda e, o, c, s: o * c - e * s),
    "sum_first": halves(lambda e, o, c, s: e * c + o * s),
    "difference_second": halves(second=lambda e, o, c, s: e * s - o * c),
    "difference_turned_around": halves(lambda e, o, c, s: o * s - e * c),
    "cosines_twice": halves(lambda e, o, c, s: e * c - o * c),
    "of_another_sine": halves(second=lambda e, o, c, s: e * (s + 1) + o * c),
    "even_twice": halves(second=lambda e, o, c, s: e * s + e * c),
    "terms_exchanged": halves(second=lambda e, o, c, s: e * c + o * s),
    "squares": halves(lambda e, o, c, s: e * o - o * e, lambda e, o, c, s: e * e + o * o),
    "divided": halves(lambda e, o, c, s: e / c - o * s),
    "alpha_of_sum": halves(second=lambda e, o, c, s: torch.add(e * s, o * c, alpha=2)),
    "alpha_of_difference": halves(lambda e, o, c, s: torch.sub(e * c, o * s, alpha=2)),
    "products_by_keyword": halves(lambda e, o, c, s: torch.mul(input=e, other=c) - o * s),
    "difference_by_keyword": halves(lambda e, o, c, s: torch.sub(input=o * s, other=e * c)),
    "places_exchanged": halves(slices=(slice(1, None, 2), slice(0, None, 2))),
    "places_are_halves": halves(slices=(slice(0, DIM // 2), slice(DIM // 2, None))),
    "places_end": halves(slices=(slice(0, DIM, 2), slice(1, None, 2))),
    "zeros": halves(empty=torch.zeros_like),
    "of_another_dtype": halves(empty=lambda y: torch.empty_like(y, dtype=torch.float64)),
    "of_another_order": halves(empty=lambda y: torch.empty_like(y.transpose(1, 2)).transpose(1, 2)),
    "column_major": halves(empty=lambda y: torch.empty_like(y, memory_format=torch.channels_last)),
    "written_twice": twice,
    "heads_first": in_order,
    "half_rotation": by_halves,
    "part_of_a_head": partly,
    "complex": complex_numbers,
    "stack_turned_around": combined(lambda e, o: torch.stack([e, -o], -1)),
    "stack_of_other_sign": combined(lambda e, o: torch.stack([o, -e], -1)),
    "stack_not_negated": combined(lambda e, o: torch.stack([o, e], -1)),
    "stack_elsewhere": combined(lambda e, o: torch.stack([-o, e], -2)),
    "stack_in_front": combined(lambda e, o: torch.stack([-o, e]).movedim(0, -1)),
    "stack_by_keyword": combined(lambda e, o: torch.stack(tensors=[-o, e], dim=-1)),
    "stack_of_three": combined(lambda e, o: torch.stack([-o, e, o], -1)[..., :2]),
    "unbind_by_keyword": combined(unbind=lambda y: torch.unbind(input=y.unflatten(-1, (-1, 2)), dim=-1)),
    "unbind_elsewhere": combined(unbind=lambda y: y.unflatten(-1, (2, -1)).unbind(-2)),
    "difference": combined(total=lambda y, w, c, s: y.float() * c - w.float() * s),
    "alpha": combined(total=lambda y, w, c, s: torch.add(y.float() * c, w.float() * s, alpha=3)),
    "tables_exchanged_once": combined(total=lambda y, w, c, s: y.float() * c + w.float() * c * s),
    "itself": combined(total=lambda y, w, c, s: y * y + w * y),
    "a_term_more": combined(total=lambda y, w, c, s: y.float() * c + w.float() * s + 1),
    "rounded_products": combined(total=lambda y, w, c, s: (y * c).half() + (w * s).half()),
    "not_cast_back": combined(cast=lambda x, y: x.double()),
    "sum_used_elsewhere": combined(cast=lambda x, y: (x.to(y.dtype), x.sum())),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROTATIONS)
def test_other_rotations(name: str, dtype: torch.dtype) -> None:
    assert_left_alone(over_tokens(ROTATIONS[name]), *arguments(dtype))


def test_halves_of_four_elements_look_like_pairs() -> None:
    x, cos, sin = noise(0, 1, 5, 4), *tables(1, 5, 4)
    for unbind in (lambda y: y.unflatten(-1, (2, 2)).unbind(-2), lambda y: y.unflatten(-1, (2, 2)).unbind(2)):
        assert_left_alone(as_one_head(combined(unbind=unbind)), x, None, cos, sin)


def test_an_embedding_by_itself() -> None:
    """The "cosines" are elements of what is rotated."""
    squares = ROTATIONS["squares"]
    assert_left_alone(as_one_head(squares), noise(0, 1, 5, 8), noise(1, 8), *tables(1, 5, 8))
    assert_left_alone(as_one_head(ROTATIONS["itself"]), noise(0, 1, 5, 8), noise(1, 8), *tables(1, 5, 8))


IN_BETWEEN: dict[str, Callable[..., Any]] = {
    "x_written": between(lambda x, *_: x.mul_(2.0)),
    "x_assigned": between(lambda x, *_: x.__setitem__(0, 1.0)),
    "y_written": between(lambda x, y, *_: y.add_(1.0)),
    "even_written": between(lambda x, y, even, *_: even.mul_(2.0)),
    "weight_written": between(lambda x, y, even, odd, weight, *_: weight.add_(1.0)),
    "cosines_written": between(after_first=lambda x, y, even, odd, cos, sin, out: (cos.mul_(0.5), None)[1]),
    "sines_written": between(after_empty=lambda x, y, even, odd, weight, cos, sin: sin.zero_()),
    "x_written_late": between(after_first=lambda x, *_: (x.mul_(2.0), None)[1]),
    "out_written": between(after_first=lambda x, y, even, odd, cos, sin, out: (out[..., 0::2].mul_(2.0), None)[1]),
    "out_read": between(after_first=lambda x, y, even, odd, cos, sin, out: out[..., 0::2].sum()),
    "norm_returned": between(result=lambda x, y, even, odd, cos, sin, out: (out, y)),
    "norm_used": between(result=lambda x, y, even, odd, cos, sin, out: out + y.mean()),
    "even_used": between(result=lambda x, y, even, odd, cos, sin, out: out + even.mean()),
    "odd_used": between(result=lambda x, y, even, odd, cos, sin, out: (out, odd)),
}


@pytest.mark.parametrize("name", IN_BETWEEN)
def test_what_is_used_or_written_in_between(name: str) -> None:
    assert_left_alone(IN_BETWEEN[name], *arguments())


def test_gradients_switched_in_between() -> None:
    def spelled(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.rms_norm(x, (HEADS * DIM,), weight, EPS).unflatten(2, (HEADS, -1))
        return written(y, cos, sin)

    x, weight, cos, sin = arguments()
    assert_left_alone(spelled, x, weight.requires_grad_(), cos, sin, grad=True)


@pytest.mark.parametrize("which", range(4))
def test_gradients(which: int) -> None:
    args = arguments()
    args[which].requires_grad_()
    assert_left_alone(over_tokens(written), *args, grad=True)
    assert run_fused(over_tokens(written), *args).fused == 1


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "double": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "per_head": lambda x: torch.cat([x * i for i in range(1, HEADS + 1)], 2),
    "one_for_all_tokens": lambda x: x[:, :1],
    "without_batch": lambda x: x[0],
    "one_for_all_pairs": lambda x: x[..., :2].repeat_interleave(1, -1)[..., :1].expand(-1, -1, -1, 2),
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_another_kind(name: str, both: bool) -> None:
    x, weight, cos, sin = arguments(torch.bfloat16)
    change = TABLES[name]
    assert_left_alone(over_tokens(written), x, weight, change(cos) if both else cos, change(sin))


NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "two_dimensions": lambda x, w: F.rms_norm(x.unflatten(2, (HEADS, -1)), (HEADS, DIM), w.view(HEADS, DIM), EPS),
    "default_epsilon": lambda x, w: F.rms_norm(x, (HEADS * DIM,), w).unflatten(2, (HEADS, -1)),
    "layer_norm": lambda x, w: F.layer_norm(x, (HEADS * DIM,), w, None, EPS).unflatten(2, (HEADS, -1)),
    "bias": lambda x, w: (F.rms_norm(x, (HEADS * DIM,), w, EPS) + 1).unflatten(2, (HEADS, -1)),
    "other_heads": lambda x, w: F.rms_norm(x, (HEADS * DIM,), w, EPS).unflatten(2, (DIM, -1)).mT.contiguous(),
    "moved_heads": lambda x, w: F.rms_norm(x, (HEADS * DIM,), w, EPS).unflatten(2, (-1, HEADS)).transpose(2, 3),
    "moved_batch": lambda x, w: F.rms_norm(x, (HEADS * DIM,), w, EPS).view(TOKENS, BATCH, HEADS, -1).transpose(0, 1),
    "other_tokens": lambda x, w: F.rms_norm(x.view(TOKENS, BATCH, -1), (24,), w, EPS).view(BATCH, TOKENS, 3, 8),
    "strided_weight": lambda x, w: F.rms_norm(x, (24,), w.repeat_interleave(2)[::2], EPS).unflatten(2, (3, 8)),
    "strided_x": lambda x, w: F.rms_norm(x.mT.contiguous().mT, (HEADS * DIM,), w, EPS).unflatten(2, (HEADS, -1)),
    "five_dimensions": lambda x, w: F.rms_norm(x[None].unflatten(3, (HEADS, -1)), (DIM,), w[:DIM], EPS)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_other_norms(name: str) -> None:
    x, weight, cos, sin = arguments()
    assert_left_alone(lambda *args: written(NORMS[name](*args[:2]), *args[2:]), x, weight, cos, sin)


def test_heads_that_do_not_lie_side_by_side() -> None:
    def spelled(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        padded = F.pad(x.unflatten(2, (HEADS, -1)), (0, 2))
        return added(F.rms_norm(padded[..., :DIM], (DIM,), weight, EPS), cos, sin)

    assert_left_alone(spelled, *arguments(per_head=True))


def test_numbers_of_double_precision() -> None:
    x, weight, cos, sin = arguments(torch.float64)
    assert_left_alone(over_tokens(written), x, weight, cos, sin)
    assert_left_alone(over_tokens(added), x, weight, cos, sin)
