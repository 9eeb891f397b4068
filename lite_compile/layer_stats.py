"""What the skip states say: density per layer and guidance stream."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .clock import CALLS, DENSE_CALLS, GENERATION, slot_table
from .control import check_model
from .decisions import format_table
from .density_history import read_dropped, read_history
from .layer_state import LayerState, layer_states
from .skip_state import COMPUTED_WORD, EPOCH_WORD, skipped_tiles, tile_count


@dataclass(frozen=True)
class StreamStats:
    """One guidance stream of one layer, in the current generation."""

    layer: str
    stream: int
    density: float
    """Share of the tiles of QK^T that the last call computed, 0 to 1."""
    steps: int
    """Denoising steps seen in this generation."""
    generations: int
    """Generations that the model's clock has seen so far."""
    calls: int
    """Calls of the model that the clock has seen, in all generations and streams."""
    dense_calls: int
    """Those of them that used no state: `dense_steps`, more streams than slots, second evaluations at a timestep..."""
    state_bytes: int
    """Memory of the layer's state for this input shape, all streams together."""
    history: tuple[float | None, ...] = ()
    """With the option `history`: density of each step of this generation; None where no state was used."""
    dropped_mass: tuple[tuple[float, float] | None, ...] = ()
    """With the option `probe`: share of the softmax, 0 to 1, that the tiles hold which a step skipped, mean and maximum
    over sampled queries, for each step of this generation; None where no state was used."""


@dataclass(frozen=True)
class Stats:
    """Statistics of several layers; `str(stats)` is a table."""

    streams: tuple[StreamStats, ...]

    @property
    def density(self) -> float:
        """Mean density over layers and streams (1.0 when nothing has run)."""
        values = [stream.density for stream in self.streams]
        return sum(values) / len(values) if values else 1.0

    def mean_history(self, stream: int) -> tuple[float | None, ...]:
        """With the option `history`: density of each step of one guidance stream, mean over its layers."""
        histories = [entry.history for entry in self.streams if entry.stream == stream]
        steps = itertools.zip_longest(*histories)
        known = [[density for density in step if density is not None] for step in steps]
        return tuple(sum(step) / len(step) if step else None for step in known)

    def dropped_mass(self, stream: int) -> tuple[tuple[float, float] | None, ...]:
        """With the option `probe`: what each step of a guidance stream dropped, mean and maximum over its layers."""
        steps = itertools.zip_longest(*(entry.dropped_mass for entry in self.streams if entry.stream == stream))
        known = [[entry for entry in step if entry is not None] for step in steps]
        return tuple(
            (sum(mean for mean, _ in step) / len(step), max(most for _, most in step)) if step else None
            for step in known
        )

    def __str__(self) -> str:
        if not self.streams:
            return "liteattention: no attention state yet"
        rows: list[tuple[str, ...]] = [("layer", "stream", "density", "steps", "generations", "calls", "dense calls")]
        for s in self.streams:
            counts = map(str, (s.steps, s.generations, s.calls, s.dense_calls))
            rows.append((s.layer, str(s.stream), f"{s.density:.3f}", *counts))
        return "\n".join(format_table(rows))


def stats(model: nn.Module | None = None) -> Stats:
    """Density of the last call, steps and generations seen, per layer and stream of `model` (None: of all models).

    With the option `history`, the density of each step of the current generation as well; with `probe`, what each step
    dropped. Reads the states from the
    device, so it waits for it: call it between steps, not inside a timed loop.
    """
    found = [stream for state in layer_states(check_model(model)) for stream in _streams(state)]
    return Stats(tuple(found))


def skip_mask(state: LayerState, stream: int) -> Tensor:
    """bool `[B, H, q_tiles, k_tiles]`: the tiles that the stream's next call will skip."""
    k_tiles = tile_count(state.spec.k_len, state.spec.tile.k)
    epoch = int(slot_table(state.clock.cpu(), state.max_streams)[2, stream])
    return skipped_tiles(state.state[stream].cpu(), epoch, k_tiles)


def _streams(state: LayerState) -> list[StreamStats]:
    clock = state.clock.cpu()
    generations = int(clock[GENERATION])
    slot_generation, slot_step, slot_epoch, slot_dense, slot_began = slot_table(clock, state.max_streams).tolist()
    k_tiles = tile_count(state.spec.k_len, state.spec.tile.k)
    found = []
    for slot in range(state.max_streams):
        header = state.state[slot, ..., : COMPUTED_WORD + 1].cpu()
        current = bool((header[..., EPOCH_WORD] == slot_epoch[slot]).all())
        dense = bool(slot_dense[slot]) and state.latest
        if not slot_epoch[slot] or slot_generation[slot] != generations or not (current or dense):
            continue  # this shape, or this stream, has not run in the current generation
        computed = header[..., COMPUTED_WORD]
        tiles = computed.numel() * k_tiles
        density = 1.0 if dense else int(computed.sum(dtype=torch.int64)) / tiles
        calls, dense_calls = int(clock[CALLS]), int(clock[DENSE_CALLS])
        steps = slot_step[slot] + 1
        history: tuple[float | None, ...] = ()
        if state.history is not None:
            history = read_history(state.history[slot].cpu(), slot_began[slot], steps, tiles)
        dropped: tuple[tuple[float, float] | None, ...] = ()
        if state.probe is not None:
            dropped = read_dropped(state.probe[slot].cpu(), slot_began[slot], steps)
        counts = (steps, generations, calls, dense_calls, state.state.nbytes)
        found.append(StreamStats(state.layer, slot, density, *counts, history, dropped))
    return found
