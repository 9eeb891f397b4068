"""What a user of `liteattention explain` writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import compiled, denoise, noise, prompt, tiny_wan

NOT_CALLABLE = 3


def make_wan() -> tuple[torch.nn.Module, dict[str, Any]]:
    arguments = {"hidden_states": noise(0), "timestep": torch.tensor([999]), "encoder_hidden_states": prompt(0)}
    return tiny_wan(), arguments


def make_model_only() -> torch.nn.Module:
    return tiny_wan()


def make_wrong_pair() -> tuple[int, list[int]]:
    return 1, [2]


def make_run() -> tuple[torch.nn.Module, Any, list[int]]:
    model = tiny_wan(layers=1)
    call = compiled(model)
    return model, lambda number: denoise(call, noise(number), [prompt(number)], 4), [0, 1]


def make_run_without_compiling() -> tuple[torch.nn.Module, Any]:
    model = tiny_wan(layers=1)
    return model, lambda: denoise(model, noise(0), [prompt(0)], 2)


def raise_something() -> None:
    raise KeyError("the user's own")
