"""What looks like a residual, a layer norm and a modulation, and is something else or is read elsewhere, stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_passes import noise
from norm_models import (
    BATCH,
    BF16,
    DIM,
    EPS,
    FP16,
    FP32,
    TOKENS,
    Arguments,
    arguments,
    gated_affine,
    gated_modulated,
    modulated,
    norm_of,
    run_fused,
)
from torch import Tensor

Spelled = Callable[..., Any]


def assert_left_alone(function: Spelled, *args: Any, grad: bool = False) -> None:
    """Also where its operands are written to, which is done to copies."""
    copies = [x.clone() if isinstance(x, Tensor) and x.is_leaf else x for x in args]
    with torch.set_grad_enabled(grad):
        expected = function(*copies)
    outcome = run_fused(function, *args, grad=grad)
    assert outcome.fused == 0
    assert outcome.is_unchanged
    assert outcome.guards == 0
    results, wanted = ((x,) if isinstance(x, Tensor) else x for x in (outcome.result, expected))
    for result, tensor in zip(results, wanted, strict=True):
        assert torch.equal(result, tensor)


def assert_close(function: Spelled, *args: Any) -> None:
    """A part is fused, and the result is the same."""
    expected = function(*(x.clone() for x in args))
    outcome = run_fused(function, *(x.clone() for x in args))
    assert outcome.fused == 1
    for result, tensor in zip(outcome.result, expected, strict=True):
        torch.testing.assert_close(result, tensor)


def whole(
    total: Callable[..., Tensor] = lambda x, y, gate: (x.float() + y.float() * gate).type_as(x),
    after_sum: Callable[..., Any] = lambda *_: None,
    norm: Callable[..., Tensor] = norm_of,
    after_norm: Callable[..., Any] = lambda *_: None,
    modulate: Callable[..., Tensor] = lambda normed, scale, shift: normed * scale + shift,
    cast: Callable[[Tensor, Tensor], Tensor] = lambda result, x: result.type_as(x),
) -> Spelled:
    """`gated_modulated` with another part or with something done in the middle; the default is fused."""

    def spelled(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = Arguments(x * 1, y, gate, scale, shift, weight, bias)
        added = total(given.x, y, gate)
        kept = after_sum(added, given)
        normed = norm(added)
        kept_too = after_norm(normed, added, given)
        result = cast(modulate(normed, scale, shift), added)
        return (added, result, *(x for x in (kept, kept_too) if x is not None))

    return spelled


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_these_differ_in_one_thing_from_what_is_fused(dtype: torch.dtype) -> None:
    for function in (whole(), modulated, gated_affine, gated_modulated):
        outcome = run_fused(function, *arguments(dtype))
        assert outcome.fused == 1
        assert not outcome.is_unchanged


def layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.layer_norm(x.float(), *args, **kwargs)


PARTS: dict[str, Spelled] = {
    # sums
    "difference": whole(lambda x, y, gate: (x.float() - y.float() * gate).type_as(x)),
    "alpha": whole(lambda x, y, gate: torch.add(x.float(), y.float() * gate, alpha=2).type_as(x)),
    "by_keyword": whole(lambda x, y, gate: torch.add(input=x.float(), other=y.float() * gate).type_as(x)),
    "factor_by_keyword": whole(lambda x, y, gate: (x.float() + torch.mul(input=y, other=gate)).type_as(x)),
    "a_number": whole(lambda x, y, gate: x + 1),
    "a_vector": whole(lambda x, y, gate: (x.float() + gate).type_as(x)),
    "two_products": whole(lambda x, y, gate: (x.float() * gate + y.float() * gate).type_as(x)),
    "product_alone": whole(lambda x, y, gate: (x.float() * gate).type_as(x)),
    "product_of_equals": whole(lambda x, y, gate: (x.float() + y.float() * y.float()).type_as(x)),
    "gate_per_token": whole(lambda x, y, gate: (x.float() + y.float() * (y.float() + gate).exp()).type_as(x)),
    "gate_for_all_channels": whole(lambda x, y, gate: (x.float() + y.float() * gate[..., :1]).type_as(x)),
    "gate_without_batch": whole(lambda x, y, gate: (x.float() + y.float() * gate[0]).type_as(x)),
    "rounded_product": whole(lambda x, y, gate: x + (y.float() * gate).type_as(y).clone()),
    "three_terms": whole(lambda x, y, gate: ((x.float() + y.float()) + y.float() * gate).type_as(x)),
    "sum_gated": whole(lambda x, y, gate: (x.float() + (x.float() + y.float()) * gate).type_as(x)),
    "rounded_otherwise": whole(lambda x, y, gate: (x.float() + y.float() * gate).half().type_as(x)),
    "double": whole(lambda x, y, gate: (x.double() + y.double() * gate).type_as(x)),
    "column_major": whole(lambda x, y, gate: (x.mT.contiguous().mT.float() + y.float() * gate).type_as(x)),
    "y_column_major": whole(lambda x, y, gate: (x.float() + y.mT.contiguous().mT.float() * gate).type_as(x)),
    "y_broadcast": whole(lambda x, y, gate: (x.float() + y[:, :1].exp().float() * gate).type_as(x)),
    # norms
    "two_dimensions": whole(norm=lambda x: layer_norm(x, x.shape[1:], None, None, EPS)),
    "integer_epsilon": whole(norm=lambda x: layer_norm(x, (DIM,), None, None, 1)),
    "rms": whole(norm=lambda x: F.rms_norm(x.float(), (DIM,), None, EPS)),
    "group": whole(norm=lambda x: F.group_norm(x.float().mT, 1, None, None, EPS).mT),
    "by_hand": whole(norm=lambda x: (x.float() - x.float().mean(-1, True)) / x.float().std(-1, keepdim=True)),
    "of_double": whole(norm=lambda x: F.layer_norm(x.double(), (DIM,), None, None, EPS).float()),
    "of_half": whole(norm=lambda x: F.layer_norm(x.half(), (DIM,), None, None, EPS).float()),
    "of_four_dimensions": whole(norm=lambda x: layer_norm(x[None], (DIM,), None, None, EPS)[0]),
    "of_a_view": whole(norm=lambda x: layer_norm(x.view(TOKENS, BATCH, DIM), (DIM,), None, None, EPS).view(x.shape)),
    "of_a_part": whole(norm=lambda x: layer_norm(x[..., ::2], (DIM // 2,), None, None, EPS).repeat(1, 1, 2)),
    # modulations
    "number": whole(modulate=lambda x, scale, shift: x * 2.0 + shift),
    "itself": whole(modulate=lambda x, scale, shift: x * x),
    "shift_first": whole(modulate=lambda x, scale, shift: (x + shift) * scale),
    "scaled_twice": whole(modulate=lambda x, scale, shift: x * scale * shift),
    "shifted_twice": whole(modulate=lambda x, scale, shift: x + scale + shift),
    "alpha_of_shift": whole(modulate=lambda x, scale, shift: torch.add(x * scale, shift, alpha=2)),
    "per_token": whole(modulate=lambda x, scale, shift: x * scale.expand(-1, TOKENS, -1).exp() + shift),
    "shift_per_token": whole(modulate=lambda x, scale, shift: x * scale + shift.repeat(1, TOKENS, 1)),
    "for_all_channels": whole(modulate=lambda x, scale, shift: x * scale[..., :1] + shift),
    "without_batch": whole(modulate=lambda x, scale, shift: x * scale[0] + shift),
    "per_channel": whole(modulate=lambda x, scale, shift: x * scale[0, 0] + shift),
    "double_scale": whole(modulate=lambda x, scale, shift: x * scale.double() + shift),
    "half_scale": whole(modulate=lambda x, scale, shift: x * scale.half() + shift),
    "another_residual": whole(modulate=lambda x, scale, shift: x * scale + x.detach()),
    "from_the_norm": whole(modulate=lambda x, scale, shift: x * x.mean(1, True) + shift),
    "a_third_dtype": whole(cast=lambda result, x: result.half().type_as(x)),
}
"""Where a part is not what the op computes, all of it stays: Inductor goes through memory for that part anyway."""

LESS: dict[str, tuple[torch.dtype, ...]] = {
    "difference": (FP32, BF16),
    "double": (FP32, BF16),
    "of_a_view": (FP32,),
    "another_residual": (FP32,),
    "from_the_norm": (FP32,),
    "a_third_dtype": (FP32,),
}
"""Where the norm itself is one that may be fused, with less around it: what it reads or makes is in memory anyway."""


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_another_part(name: str, dtype: torch.dtype) -> None:
    if dtype in LESS.get(name, ()):
        assert_close(PARTS[name], *arguments(dtype))
    else:
        assert_left_alone(PARTS[name], *arguments(dtype))


@pytest.mark.parametrize("batch", [1, BATCH])
def test_vectors_of_another_batch(batch: int) -> None:
    """A table of two entries makes two of one entry of x."""
    args = arguments(BF16, batch=1, table_batch=batch)
    if batch == 1:
        assert run_fused(gated_modulated, *args).fused == 1
    else:
        assert_left_alone(gated_modulated, *args)


IN_BETWEEN: dict[str, Spelled] = {
    "x_written": whole(after_sum=lambda added, given: (given.x.mul_(2.0), None)[1]),
    "y_written": whole(after_sum=lambda added, given: (given.y.mul_(2.0), None)[1]),
    "gate_written": whole(after_norm=lambda normed, added, given: (given.gate.mul_(2.0), None)[1]),
    "scale_written": whole(after_norm=lambda normed, added, given: (given.scale[0].zero_(), None)[1]),
    "sum_written": whole(after_sum=lambda added, given: (added.add_(1.0), None)[1]),
    "sum_assigned": whole(after_sum=lambda added, given: added.__setitem__(0, 1.0)),
    "sum_written_later": whole(after_norm=lambda normed, added, given: (added.add_(1.0), None)[1]),
    "norm_written": whole(after_norm=lambda normed, added, given: (normed.add_(1.0), None)[1]),
    "norm_used": whole(after_norm=lambda normed, added, given: normed.mean()),
    "norm_returned": whole(after_norm=lambda normed, added, given: normed),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", IN_BETWEEN)
def test_what_is_written_or_read_in_between(name: str, dtype: torch.dtype) -> None:
    if dtype is FP32 and name in ("norm_written", "norm_used", "norm_returned"):  # of the dtype that the op makes
        assert_close(IN_BETWEEN[name], *arguments(dtype))
    else:
        assert_left_alone(IN_BETWEEN[name], *arguments(dtype))


def wide_sum_read(x: Tensor, y: Tensor, gate: Tensor, *_: Tensor) -> Any:
    wide = x.float() + y * gate
    return wide, norm_of(wide.type_as(x)).type_as(x)


def wide_x_read(x: Tensor, y: Tensor, gate: Tensor, *_: Tensor) -> Any:
    wide = x.float()
    return wide, norm_of((wide + y * gate).type_as(x)).type_as(x)


def product_read(x: Tensor, y: Tensor, gate: Tensor, *_: Tensor) -> Any:
    product = y.float() * gate
    return product, norm_of((x.float() + product).type_as(x)).type_as(x)


@pytest.mark.parametrize("spelled", [wide_sum_read, wide_x_read, product_read])
def test_steps_that_something_else_reads(spelled: Spelled) -> None:
    assert_left_alone(spelled, *arguments(BF16))


def gate_from_the_sum(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor) -> Any:
    total = x + y
    return total, (norm_of(total) * total.float().mean(1, keepdim=True) + shift).type_as(x)


def shift_behind_a_reader_of_the_sum(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *_: Tensor
) -> Any:
    """The shift is made after the sum is read: in no place the op has all operands and serves all readers."""
    total = x + y
    read = total.exp()
    return read, (norm_of(total) * scale + shift.exp()).type_as(x)


@pytest.mark.parametrize("spelled", [gate_from_the_sum, shift_behind_a_reader_of_the_sum])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_operands_that_come_too_late(spelled: Spelled, dtype: torch.dtype) -> None:
    assert_left_alone(spelled, *arguments(dtype))


def test_results_of_another_dtype() -> None:
    """Read in float32 by two."""

    def spelled(x: Tensor, y: Tensor, gate: Tensor, *_: Tensor) -> Any:
        total = (x.float() + y * gate).type_as(x)
        wide = norm_of(total)
        return total, wide.exp(), wide.sin()

    assert_left_alone(spelled, *arguments(BF16))
    assert run_fused(spelled, *arguments(FP32)).fused == 1


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_terms_of_another_dtype(dtype: torch.dtype) -> None:
    other = FP16 if dtype is BF16 else BF16
    x, y, *others = arguments(dtype)
    assert_left_alone(gated_modulated, x, y.to(other), *others)


@pytest.mark.parametrize("which", range(7))
def test_gradients(which: int) -> None:
    def spelled(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor) -> Any:
        total = (x.float() + y * gate).type_as(x)
        return total, (norm_of(total, w, b) * scale + shift).type_as(x)

    args = [x.clone() for x in arguments()]
    args[which].requires_grad_()
    assert_left_alone(spelled, *args, grad=True)
    assert run_fused(spelled, *args).fused == 1


def test_gradients_switched_in_between() -> None:
    def spelled(x: Tensor, y: Tensor, *_: Tensor) -> Any:
        with torch.no_grad():
            total = x + y
            normed = norm_of(total)
        return total, normed.type_as(x)

    def detached(x: Tensor, y: Tensor, *_: Tensor) -> Any:
        return norm_of(x.detach()).type_as(x)

    x, y, *_ = arguments(BF16)
    assert_left_alone(spelled, x.requires_grad_(), y, grad=True)
    outcome = run_fused(detached, x, y, grad=True)
    assert not outcome.result.requires_grad
    assert torch.equal(outcome.result, detached(x, y))


@pytest.mark.parametrize("which", [5, 6])
def test_weights_that_are_not_dense(which: int) -> None:
    def spelled(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, w: Tensor, b: Tensor) -> Any:
        return F.layer_norm(x, (DIM,), w, b, EPS)

    args = list(arguments())
    args[which] = torch.stack([args[which]] * 2, 1)[:, 0]
    assert_left_alone(spelled, *args)


def test_numbers_of_double_precision() -> None:
    def spelled(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, *_: Tensor) -> Any:
        total = x + y * gate
        return total, F.layer_norm(total, (DIM,), None, None, EPS) * scale

    assert_left_alone(spelled, *(x.double() for x in arguments()))


def test_an_input_of_two_dimensions() -> None:
    def spelled(x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), None, None, EPS)

    assert_left_alone(spelled, noise(0, TOKENS, DIM))
    assert run_fused(spelled, noise(0, 1, TOKENS, DIM)).fused == 1


def test_channels_that_are_a_symbol() -> None:
    def spelled(x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), None, None, EPS)

    x = noise(0, BATCH, TOKENS, DIM)
    torch._dynamo.mark_dynamic(x, 2)
    assert_left_alone(spelled, x)
