"""A denoiser of a few blocks that are compiled one by one, and which of them use a mask that an earlier call made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from graphs import DIM, Attention
from models import DEVICE, DTYPE, OPTIONS
from torch import Tensor, nn

from lite_compile import ops
from lite_compile.ops import NOW_EPOCH, NOW_SLOT
from lite_compile.root_clock import root_of
from lite_compile.root_contents import RootContents
from lite_compile.skip_state import EPOCH_WORD

TOKENS, BLOCKS = 64, 4


class Block(nn.Module):
    """Self-attention and one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out, self.act = Attention(), nn.Linear(DIM, DIM), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.act(self.attn(x)))


class Blocks(nn.Module):
    """Runs the blocks that `order` names, between a head and a last norm."""

    def __init__(self, make: Callable[[], nn.Module] = Block, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList([make() for _ in range(BLOCKS)])
        self.norm_out = nn.LayerNorm(DIM)
        self.order = list(range(BLOCKS))
        self.before: dict[int, Callable[[], object]] = {}
        """What happens before the block that is so many-th in `order`; -1: before the head, but after hooks."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.before.get(-1, _nothing)()
        x = self.head(hidden_states) + timestep.to(hidden_states)
        for place, number in enumerate(self.order):
            self.before.get(place, _nothing)()
            x = self.blocks[number](x)
        self.before.get(len(self.order), _nothing)()
        out: Tensor = self.norm_out(x)
        return out


def _nothing() -> None: ...


def compiled_blocks(make: Callable[[], nn.Module] = Block, seed: int = 0, **options: Any) -> Blocks:
    """The model on the tests' device, each of its blocks compiled in place."""
    model = Blocks(make, seed).to(DEVICE, DTYPE).eval()
    for block in model.blocks:
        compile_block(block, **options)
    return model


def compile_block(block: nn.Module, **options: Any) -> None:
    block.compile(backend="liteattention", options={**OPTIONS, **options})


def contents_of(model: nn.Module) -> RootContents:
    root = root_of(model)
    assert root is not None
    return root._contents


@contextmanager
def recorded_uses() -> Iterator[list[bool]]:
    """Of each attention that runs, whether it uses a mask that was made by an earlier call."""
    uses: list[bool] = []

    def watch(q: Tensor, k: Tensor, state: Tensor, now: Tensor, *rest: object) -> None:
        slot = int(now[NOW_SLOT])
        uses.append(slot >= 0 and bool((state[slot, ..., EPOCH_WORD] == now[NOW_EPOCH]).any()))

    ops.watchers.append(watch)
    try:
        yield uses
    finally:
        ops.watchers.remove(watch)


class Run:
    """One generation: each call of the model is its next step."""

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model = model
        self.latents = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)
        self.steps = 0

    @torch.no_grad()
    def step(self) -> list[bool]:
        """Of the blocks that ran, in their order: whether they used a mask of an earlier step."""
        time = torch.tensor([1000.0 - self.steps], device=DEVICE)
        x = self.latents * 0.98**self.steps  # each step so large that 16 bits tell it
        self.steps += 1
        with recorded_uses() as uses:
            assert self.model(x, time).isfinite().all()
        return uses
