"""What tells a calibration's prompts from others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from lite_compile.calibration.digest import digest


def _large(changed: int | None = None) -> torch.Tensor:
    """More numbers than `repr` shows."""
    numbers = torch.zeros(3000)
    if changed is not None:
        numbers[changed] = 1
    return numbers


def test_prompts_that_differ_have_digests_that_do() -> None:
    lists: list[list[Any]] = [
        [], [[]], [1, 23], [12, 3], [1, 2, 3], [123], ["a", "b"], ["ab"], ["a, b"], ["1"], [1], [None], [{"a": 1}],
        [{"a": [1]}], [torch.zeros(2, 3)], [torch.zeros(3, 2)], [torch.zeros(6)],
        [torch.zeros(6, dtype=torch.bfloat16)], [torch.tensor(1)], [torch.zeros(0)], [_large()], [_large(1500)],
        [{"embeds": _large()}], [{"embeds": _large(1500)}],
        [(_large(1500),)], [_large(1500).numpy()], [_large(1501).numpy()], [np.array(["a", None], dtype=object)],
    ]  # fmt: skip
    for a, b in itertools.combinations(lists, 2):
        assert digest(a) != digest(b), (a, b)


def test_equal_prompts_have_the_same_digest() -> None:
    assert digest([_large(7), {"a": (1, "b")}]) == digest([_large(7).clone(), {"a": (1, "b")}])
    assert digest([_large()[::2]]) == digest([_large()[::2].contiguous()])
