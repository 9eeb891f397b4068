"""Attention that drifts from step to step, and what the criterion "mass" promises of it, measured in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lite_compile.ops import LOG2_E
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

STEPS = 4
NO_KEY = 1e-30
"""Share of a row's softmax, that counts as none: of keys with a bias of -10000."""


class Case(NamedTuple):
    """One generation of one layer."""

    seed: int
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    dtype: torch.dtype
    tile: TileShape
    peak: float
    """Log2 units between the keys that a row favours and those that it does not."""
    noise: float
    """Spread of the scores besides, log2 units."""
    turns: int
    """How often the rows go around the ring of the keys."""
    drift: float
    """Share of q and k that is new at each step."""
    budgets: tuple[float, ...]
    """One for each step: `2**threshold`."""
    bias: str
    protected: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.q_len


class Outcome(NamedTuple):
    """What was seen in one case."""

    rows: int
    marked: int
    """Rows that lost a tile which holds keys they may attend to."""
    tightest: float
    """Largest share of what a tile may weigh that a marked one weighed."""
    spent: float
    """Largest share of its budget that a row spent in the generation."""


def summarise(outcomes: list[Outcome]) -> Outcome:
    """All of them as one; printed, so that `pytest -s` shows how much was tested."""
    rows, marked, tightest, spent = zip(*outcomes, strict=True)
    total = Outcome(sum(rows), sum(marked), max(tightest), max(spent))
    print(f"{len(outcomes)} generations: {total}")
    return total


def draw_case(seed: int, tiles: list[TileShape], dtypes: list[torch.dtype]) -> Case:
    """A case at random, the same for the same seed."""
    draw = random.Random(seed)
    tile = draw.choice(tiles)
    kv_heads = draw.choice([1, 2])
    q_len, k_len = draw.randint(tile.q // 2, 3 * tile.q), draw.randint(2 * tile.k, 20 * tile.k)
    budgets = sorted(2.0 ** draw.uniform(-12, 0) for _ in range(STEPS))
    if draw.random() < 0.3:
        draw.shuffle(budgets)
    protected = sorted(draw.randint(0, k_len) for _ in range(4)) if draw.random() < 0.25 else []
    return Case(
        seed, draw.choice([1, 2]), kv_heads * draw.choice([1, 2]), kv_heads, q_len, k_len, draw.choice([16, 32, 64]),
        draw.choice(dtypes), tile, 2 ** draw.uniform(2, 6), 2 ** draw.uniform(-4, 2), draw.randint(0, 3),
        draw.choice([0.0, 0.05, 0.3]), tuple(budgets),
        draw.choice(["none", "none", "small", "infinite", "finite", "no keys"]), tuple(protected),
    )  # fmt: skip


def drifting(case: Case) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of each step: rows favour the keys around one place of a ring, more sharply from step to step."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(case.batch, heads, length, case.dim, generator=generator)

    def on_ring(place: Tensor) -> Tensor:
        """`[length, 2]`: places on a ring, from 0 to 1, as a product of q and k that is `peak` apart at most."""
        return torch.stack([(2 * math.pi * place).cos(), (2 * math.pi * place).sin()], -1) * math.sqrt(case.peak / 2)

    row = torch.arange(case.q_len) / case.tile.q  # the rows of a tile favour nearly the same keys
    rings = [
        on_ring(case.turns * (row.floor() + 0.3 * row.frac()) / row[-1].ceil()),
        on_ring(torch.arange(case.k_len) / case.k_len),
    ]

    shapes = [(case.heads, case.q_len), (case.kv_heads, case.k_len), (case.kv_heads, case.k_len)]
    q, k, v = (normal(*shape) for shape in shapes)
    for step in range(STEPS):
        old, new = math.sqrt(1 - case.drift**2), case.drift
        q, k = old * q + new * normal(*shapes[0]), old * k + new * normal(*shapes[1])
        strength = math.sqrt(case.noise) * case.dim**-0.25
        moved = []
        for x, ring, sharpness in zip((q, k), rings, (1 + 0.3 * step, 1.0), strict=True):
            y = x * strength
            y[..., :2] += ring
            moved.append(y * sharpness * (case.dim**0.5 / LOG2_E) ** 0.5)  # for a softmax scale of dim ** -0.5
        yield moved[0].to(case.dtype), moved[1].to(case.dtype), v.to(case.dtype)


def bias_of(case: Case) -> Tensor | None:
    """float32 `[batch, k_len]`; only with "no keys" rows are left with nothing to attend to."""
    bias = torch.zeros(case.batch, case.k_len)
    generator = torch.Generator().manual_seed(case.seed)
    if case.bias == "small":
        return torch.randn(case.batch, case.k_len, generator=generator)
    if case.bias in ("infinite", "finite"):
        bias[-1, case.k_len // 2 :] = -math.inf if case.bias == "infinite" else -10000.0
        bias[0, : case.tile.k] = bias[-1, -1]
    if case.bias == "no keys":
        bias[-1] = -math.inf
    return None if case.bias == "none" else bias


Attend = Callable[..., None]
"""Called with q, k, v, state, now, scale, threshold, tile, key_bias, protected: marks tiles in `state`."""


def check_bound(attend: Attend, case: Case, rounding: float = 2.0**-24) -> Outcome:
    """Run a generation; assert of each row and step that what was marked is within the budget.

    The slack is what rounding in float32 can do to scores and sums, see docs/guarantee.md; `rounding`: relative, of one
    addition or product in a score.
    """
    tile, scale = case.tile, case.dim**-0.5
    k_tiles, bias = tile_count(case.k_len, tile.k), bias_of(case)
    state = torch.zeros(state_shape(1, case.batch, case.heads, case.q_len, case.k_len, tile), dtype=torch.int32)
    now = torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32)
    of_row = torch.arange(case.q_len) // tile.q
    before = _marks(state, k_tiles)
    spent = torch.zeros(case.batch, case.heads, case.q_len, dtype=torch.float64)
    lost = torch.zeros_like(spent, dtype=torch.bool)
    tightest = 0.0
    for (q, k, v), budget in zip(drifting(case), case.budgets, strict=True):
        attend(q, k, v, state, now, scale, torch.tensor(math.log2(budget)), tile, bias, case.protected)
        after = _marks(state, k_tiles)
        assert not (before & ~after).any(), "a mark was taken back"
        new = (after & ~before)[:, :, of_row]  # of each row
        before = after
        mass, slack, empty = _exact(case, q, k, bias, rounding)
        assert not (new & empty[..., None]).any(), "marked by a row that has nothing to attend to"
        mass = mass * new
        largest = float(mass.max()) * k_tiles / budget
        assert largest <= slack, f"{case}: a tile of {largest:.6f} of its share, {slack=:.6f}"
        tightest = max(tightest, largest)
        spent += mass.sum(-1)
        lost |= (mass > NO_KEY).any(-1)
        assert (spent <= max(case.budgets) * slack).all(), f"{case}: {(spent / budget).max():.6f} of the budget"
    return Outcome(case.rows, int(lost.sum()), tightest, float((spent / max(case.budgets)).max()))


def _marks(state: Tensor, k_tiles: int) -> Tensor:
    """bool `[B, H, q_tiles, k_tiles]`."""
    return unpack_bits(state[0, ..., row_layout(k_tiles).mask_start :], k_tiles)


def _exact(case: Case, q: Tensor, k: Tensor, bias: Tensor | None, rounding: float) -> tuple[Tensor, float, Tensor]:
    """Share of each tile in each row's softmax over all keys, float64 `[B, H, Sq, k_tiles]`; the factor by which
    float32 may miss it; and which rows have no key, bool `[B, H, Sq]`."""
    keys = k.double().repeat_interleave(case.heads // case.kv_heads, 1)
    factor, exact = case.dim**-0.5 * LOG2_E, q.double()
    scores = exact @ keys.mT * factor
    largest = exact.abs() @ keys.mT.abs() * factor
    if bias is not None:
        added = bias.double()[:, None, None] * LOG2_E
        scores = scores + added
        largest = largest + torch.where(added < -1000, 0.0, added.abs())
    empty = (scores == -math.inf).all(-1)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True).clamp(min=-1e30))
    shares = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    k_tiles = tile_count(case.k_len, case.tile.k)
    padded = torch.nn.functional.pad(shares, (0, k_tiles * case.tile.k - case.k_len))
    error = (case.dim + 4) * rounding * float(largest.max())
    return padded.unflatten(-1, (k_tiles, -1)).sum(-1), 2 ** (2 * error) * (1 + (k_tiles + 8) * 2.0**-21), empty
