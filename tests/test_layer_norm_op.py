"""The ops `add_normalize` and `normalize` on the CPU, where they are the specification of the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from norm_models import BATCH, BF16, DIM, EPS, FP16, FP32, TOKENS, arguments
from torch import Tensor

from lite_compile.layer_norm_op import add_normalize, normalize

CASES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "gate": ("gate",),
    "affine": ("gate", "weight", "bias"),
    "modulation": ("scale", "shift"),
    "parts": ("weight", "shift"),
    "all": ("gate", "weight", "bias", "scale", "shift"),
}


def given(dtype: torch.dtype, names: tuple[str, ...], modulation: torch.dtype = FP32) -> dict[str, Any]:
    """By the names of the arguments."""
    found = arguments(dtype, modulation)._asdict()
    return {name: x if name in ("x", "y", *names) else None for name, x in found.items()} | {"eps": EPS}


def without_sum(named: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in named.items() if name not in ("y", "gate")}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_they_are_rounded_once(case: str, dtype: torch.dtype) -> None:
    named = given(dtype, CASES[case])
    total, normed = add_normalize(**named)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in named.items()}
    added = exact["x"] + exact["y"] * (1 if exact["gate"] is None else exact["gate"])
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(total.double(), added, rtol=bound, atol=bound)
    wanted = torch.layer_norm(total.double(), (DIM,), exact["weight"], exact["bias"], EPS)
    wanted = wanted * (1 if exact["scale"] is None else exact["scale"])
    wanted = wanted + (0 if exact["shift"] is None else exact["shift"])
    torch.testing.assert_close(normed.double(), wanted, rtol=bound, atol=4e-6)
    assert torch.equal(normalize(**without_sum(named | {"x": total})), normed)
    assert total.dtype is normed.dtype is dtype


@pytest.mark.parametrize("case", CASES)
def test_they_are_sound_operators(case: str) -> None:
    """What else `opcheck` does traces the launch of the kernel: see tests/gpu."""
    named = given(BF16, CASES[case], BF16)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(add_normalize, (), named, test_utils=utils)
    torch.library.opcheck(normalize, (), without_sum(named), test_utils=utils)


def test_results_are_dense_and_no_input() -> None:
    named = given(FP32, CASES["all"])
    expected = add_normalize(**named)
    for name in ("x", "y"):
        found = add_normalize(**named | {name: named[name].mT.contiguous().mT})
        for result, wanted in zip(found, expected, strict=True):
            assert result.is_contiguous()
            torch.testing.assert_close(result, wanted)
    result = normalize(named["x"].mT.contiguous().mT, None, None, None, None, EPS)
    assert result.shape == (BATCH, TOKENS, DIM)
    assert result.is_contiguous()
    pointers = {x.data_ptr() for x in (*expected, named["x"], named["y"])}
    assert len(pointers) == 4
