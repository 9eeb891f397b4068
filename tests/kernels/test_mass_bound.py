"""The bound of the criterion "mass" on random generations, reference and CPU kernel, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from mass_bound import check_bound, draw_case, summarise
from torch import Tensor

from lite_compile.kernels.attend_cpu import attend_cpu
from lite_compile.ops import attend_reference
from lite_compile.skip_state import TileShape

TILES = [TileShape(16, 16), TileShape(32, 16), TileShape(64, 32), TileShape(128, 64)]


def cpu(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor, tile: TileShape,
    key_bias: Tensor | None, protected: Sequence[int],
) -> None:  # fmt: skip
    out = torch.empty_like(q)
    attend_cpu(q, k, v, state, now, scale, threshold, tile, out, None, key_bias, protected, criterion="mass")


def reference(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor, tile: TileShape,
    key_bias: Tensor | None, protected: Sequence[int],
) -> None:  # fmt: skip
    attend_reference(q, k, v, state, now, scale, threshold, tile, key_bias, protected, criterion="mass")


@pytest.mark.parametrize(
    ("attend", "cases", "dtypes"),
    [
        (cpu, 60, [torch.float32, torch.bfloat16, torch.float16]),
        (reference, 40, [torch.float32, torch.float64]),
    ],
    ids=["cpu", "reference"],
)
def test_what_is_marked_stays_within_the_budget(
    attend: Callable[..., None], cases: int, dtypes: list[torch.dtype]
) -> None:
    seen = summarise([check_bound(attend, draw_case(seed, TILES, dtypes)) for seed in range(cases)])
    assert seen.rows >= 10_000
    assert seen.marked >= seen.rows / 4
    assert seen.tightest > 0.98
    assert seen.spent > 0.25
