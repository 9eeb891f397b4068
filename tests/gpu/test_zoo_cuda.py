"""The zoo in 16 bits on a real GPU: rewritten models are as exact as the models themselves."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEVICE, DTYPE
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lite_compile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "zoo"))

from zoo_model import Prompt, ZooModel, first_tensor
from zoo_models import ZOO
from zoo_runs import compile_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def arguments(zoo: ZooModel, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Those of one call, as a pipeline in `dtype` gives them: times stay what they are."""

    def move(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() and x.numel() > 1 else x.to(device)

    return tree_map_only(Tensor, move, zoo.arguments(zoo.noise(0), torch.tensor([500.0]), Prompt(0)))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, zoo in ZOO.items() if zoo.rewritten])
def test_nothing_skipped_is_as_exact_as_the_model(name: str) -> None:
    zoo = ZOO[name]
    exact = first_tensor(zoo.make()(**arguments(zoo, torch.device("cpu"), torch.float32)))
    given = arguments(zoo, DEVICE, DTYPE)
    try:
        dense = first_tensor(zoo.make().to(DEVICE, DTYPE)(**given))
    except RuntimeError as error:  # parts of it have to stay in float32, which from_pretrained sees to
        pytest.skip(f"the model itself does not run in {DTYPE}: {str(error).splitlines()[0]}")
    sparse = first_tensor(compile_model(zoo.make().to(DEVICE, DTYPE), threshold=-math.inf)(**given))
    assert len(lite_compile.report().rewritten) == zoo.rewritten
    ours, theirs = ((x.cpu().float() - exact).norm() / exact.norm() for x in (sparse, dense))
    assert ours <= 2 * theirs + 1e-3
