"""What the zoo knows of a model: how a tiny one is made and called, and what the backend is expected to do with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lite_compile import Reason


@dataclass(frozen=True)
class Prompt:
    """Embeddings of one prompt, in whatever shape a model wants them."""

    seed: int

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + self.seed))


QUERY_PROJECTIONS = {"to_q", "to_query", "add_q_proj", "q_proj"}
QUERY_KEY_NORMS = {"norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm", "q_norm", "k_norm"}
Arguments = Callable[[Tensor, Tensor, Prompt], dict[str, Any]]


@dataclass(frozen=True)
class ZooModel:
    """One row of `docs/models.md`. `python tests/zoo/models_doc.py --numbers` prints the numbers as they are."""

    class_name: str
    variant: str
    build: Callable[[], nn.Module]
    """A tiny model with random weights."""
    arguments: Arguments
    """Keyword arguments of one call, from latents, a timestep `[1]` between 1000 and 0, and a prompt."""
    latents: tuple[int, ...]
    rewritten: int
    dense: Mapping[Reason, int] = field(default_factory=dict)
    """Attention sites that stay dense, counted by reason."""
    graphs: int = 1
    note: str = ""
    skips: bool = True
    """Whether the random weights make any tile negligible."""

    @property
    def name(self) -> str:
        """Identifies the model among the tests."""
        return re.sub(r"\W+", "-", f"{self.class_name} {self.variant}".strip())

    def make(self) -> nn.Module:
        """The model, the same at each call."""
        torch.manual_seed(0)
        model = self.build().eval()
        sharpen(model)
        return model

    def noise(self, seed: int) -> Tensor:
        """Latents to start from."""
        return torch.randn(self.latents, generator=torch.Generator().manual_seed(seed))


def sharpen(model: nn.Module) -> None:
    """Make the attention of a random model matter, and peaked, so that tiles become negligible.

    Gates and output layers that begin at zero get random weights. Queries get a common offset where their projection
    has a bias, and so prefer some keys to others; where they are normalised, the norms' weights make the scores large.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            layer = module.rpartition(".")[2]
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
            elif kind == "bias" and layer in QUERY_PROJECTIONS:
                parameter.normal_(std=16)
            elif kind == "bias" and layer == "qkv":
                parameter[: len(parameter) // 3].normal_(std=16)
            elif kind == "weight" and layer in QUERY_KEY_NORMS:
                parameter.fill_(4.0)


def first_tensor(output: Any) -> Tensor:
    """The prediction among what a model returns."""
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, list | tuple) else output.sample
    return output
