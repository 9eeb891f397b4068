"""What each denoising step computed and what it dropped, written by the graph itself where an option asks for it.

A history belongs to one layer and input shape: int64 `[streams, HISTORY_STEPS, 2]`, per stream and step the epoch that
wrote the entry and the number of tiles of QK^T that the call computed, all batch entries and heads together. As in the
skip state, an entry of an earlier epoch counts as empty: a new generation need not clear anything.

The option `probe` adds another one, float64 `[streams, HISTORY_STEPS, 3]`: the epoch, and mean and maximum of the
softmax mass that sampled rows lost at that step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .ops import NOW_EPOCH, NOW_SLOT, NOW_STEP
from .skip_state import COMPUTED_WORD

HISTORY_STEPS = 128
"""Steps of a generation that are remembered; later ones leave no entry."""
HISTORY_EPOCH, HISTORY_COMPUTED = range(2)


def history_shape(streams: int) -> tuple[int, int, int]:
    """Shape of the int64 history of one layer."""
    return (streams, HISTORY_STEPS, 2)


def probe_shape(streams: int) -> tuple[int, int, int]:
    """Shape of the float64 history of what one layer dropped."""
    return (streams, HISTORY_STEPS, 3)


@has_side_effect
def record_density(histories: Sequence[Tensor], states: Sequence[Tensor], now: Tensor) -> None:
    """Write down what the running call computed, one entry per layer; nothing where no state was used (slot -1).

    Runs inside of the compiled graph, after the layers' attention, and never waits for the device.

    Args:
        histories: int64 `[streams, HISTORY_STEPS, 2]` per layer, updated in place.
        states: the layers' skip states, int32 `[streams, B, H, q_tiles, row_words]`.
        now: int32, as `attend` takes it.
    """
    slot = now[NOW_SLOT]
    for history, state in zip(histories, states, strict=True):
        rows = state[..., COMPUTED_WORD].index_select(0, slot.clamp(0, state.shape[0] - 1)[None])
        _write(history, rows.sum(dtype=torch.int64)[None], now)


@has_side_effect
def record_dropped(histories: Sequence[Tensor], masses: Sequence[Tensor], now: Tensor) -> None:
    """Write down what the running call dropped, in the same manner.

    Args:
        histories: float64 `[streams, HISTORY_STEPS, 3]` per layer, updated in place.
        masses: float32 `[2]` per layer, as `dropped_mass` gives it.
    """
    for history, mass in zip(histories, masses, strict=True):
        _write(history, mass.to(torch.float64), now)


def _write(history: Tensor, values: Tensor, now: Tensor) -> None:
    """Write the epoch and `values` of the running call, of the dtype of `history`, into its place, if it has one."""
    streams = torch.arange(history.shape[0], device=history.device)
    steps = torch.arange(HISTORY_STEPS, device=history.device)
    written = ((streams == now[NOW_SLOT])[:, None] & (steps == now[NOW_STEP]))[..., None]
    entry = torch.cat([now[NOW_EPOCH].to(history.dtype)[None], values])
    history.copy_(torch.where(written, entry, history))


def read_history(history: Tensor, began: int, steps: int, tiles: int) -> tuple[float | None, ...]:
    """Density of each step of a stream's current generation; None where nothing was recorded.

    Args:
        history: int64 `[HISTORY_STEPS, 2]` of the stream.
        began: first epoch of the stream in this generation; refreshes give it later ones.
        steps: how many the generation has seen.
        tiles: of QK^T, all batch entries and heads together.
    """
    entries = history[: min(steps, HISTORY_STEPS)].tolist()
    return tuple(computed / tiles if writer >= began else None for writer, computed in entries)


def read_dropped(history: Tensor, began: int, steps: int) -> tuple[tuple[float, float] | None, ...]:
    """Mean and maximum of what each step of a stream's current generation dropped; None as for `read_history`.

    Args:
        history: float64 `[HISTORY_STEPS, 3]` of the stream.
    """
    entries = history[: min(steps, HISTORY_STEPS)].tolist()
    return tuple((mean, most) if writer >= began else None for writer, mean, most in entries)
