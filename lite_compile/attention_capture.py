"""Catch q, k and the skipped tiles of one layer while the compiled model runs, and compute its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .control import check_model
from .layer_state import LayerState, layer_states
from .layer_stats import skip_mask
from .ops import NOW_EPOCH, NOW_SLOT, NOW_STEP, watchers
from .options import nearest
from .skip_state import TileShape, skipped_tiles, tile_count

MAX_CELLS = 512
"""Cells of an attention map per side."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention of one layer: its operands, and the tiles that it skipped."""

    layer: str
    stream: int
    step: int
    """0 for the first; -1 where the operands were given by hand."""
    q: Tensor
    """`[B, H, Sq, D]`."""
    k: Tensor
    """`[B, Hkv, Sk, D]`, where `Hkv` divides `H`."""
    key_bias: Tensor | None
    """float32 `[B, Sk]` or `[1, Sk]`, added to the scaled scores."""
    scale: float
    tile: TileShape
    skipped: Tensor
    """bool `[B, H, q_tiles, k_tiles]`, on the CPU."""

    @property
    def density(self) -> float:
        """Share of the tiles that were computed, 0 to 1."""
        return 1 - int(self.skipped.sum()) / self.skipped.numel()


class AttentionMap(NamedTuple):
    """What one head attends to, in cells of `rows` queries by `columns` keys."""

    weights: Tensor
    """float32 `[cells, cells]` on the CPU: mean softmax weight in a cell, times the number of keys (1: uniform)."""
    rows: int
    columns: int
    mean_skipped: float
    """Softmax mass of the skipped tiles, 0 to 1: mean over the queries."""
    max_skipped: float
    """The same of the query that loses most."""


@contextmanager
def capture_attention(model: nn.Module, layer: str, step: int | None = None) -> Iterator[list[AttentionCall]]:
    """Within the context, catch the attention of `layer` at each call of the compiled `model`: the last one per stream.

        with lite_compile.capture_attention(model, "blocks.3.attn1", step=10) as calls:
            pipe("a prompt")
        lite_compile.plot_attention(calls[0], path="attention.png")

    Reads the clock after each call of the layer, so it waits for the device; q and k are copied.

    Args:
        model: the denoiser itself, for example `pipe.transformer`, compiled or not.
        layer: as `lite_compile.stats(model)` prints it.
        step: catch this step only (0 is the first).

    Raises:
        ValueError: the model has no such layer, or it took no such step.
        RuntimeError: the layer was not called, or runs in CUDA graphs, which pass nothing by.
    """
    if check_model(model) is None:
        raise TypeError("model is None; allowed: a torch.nn.Module")
    if layer_states(model):
        _check_layer(model, layer)
    calls: list[AttentionCall] = []
    steps: list[int] = []

    def watch(
        q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile: TileShape, key_bias: Tensor | None
    ) -> None:
        owner = next((s for s in layer_states(model) if s.state.data_ptr() == state.data_ptr()), None)
        if owner is None or owner.layer != layer:
            return
        epoch, current, slot = (int(now[word]) for word in (NOW_EPOCH, NOW_STEP, NOW_SLOT))
        if not 0 <= slot < state.shape[0]:
            return  # dense, and part of no stream
        steps.append(current)
        if step not in (None, current):
            return
        skipped = skipped_tiles(state[slot].cpu(), epoch, tile_count(k.shape[2], tile.k))
        bias = None if key_bias is None else key_bias.clone()
        calls[:] = [call for call in calls if call.stream != slot]
        calls.append(AttentionCall(layer, slot, current, q.clone(), k.clone(), bias, scale, tile, skipped))

    watchers.append(watch)
    try:
        yield calls
    finally:
        watchers[:] = [other for other in watchers if other is not watch]
    if calls:
        return
    _check_layer(model, layer)
    if steps:
        raise ValueError(f"step is {step!r}; allowed: one that was taken, {min(steps)} to {max(steps)}")
    raise RuntimeError(
        f"no call of layer {layer!r} that uses its state was seen: call the compiled model within capture_attention, "
        "without mode='reduce-overhead' (CUDA graphs replay what they recorded, and pass nothing by)"
    )


def given_attention(
    model: nn.Module, layer: str, q: Tensor, k: Tensor, stream: int = 0, scale: float | None = None
) -> AttentionCall:
    """q and k that the caller has, with the tiles that the stream's next call of that layer will skip.

    Raises:
        ValueError: the model has no such layer or stream, or q and k are not of the shape that it was called with.
    """
    states = [state for state in layer_states(check_model(model)) if state.layer == layer]
    if not states:
        _check_layer(model, layer)
    known = [state for state in states if _fits(state, q, k)]
    if not known:
        shapes = " or ".join(f"[{s.spec.shape[1]}, {s.spec.shape[2]}, {s.spec.q_len}, D]" for s in states)
        raise ValueError(f"q is {tuple(q.shape)}, k {tuple(k.shape)}; allowed for layer {layer!r}: q {shapes}")
    if not 0 <= stream < known[0].max_streams:
        raise ValueError(f"stream is {stream!r}; allowed: 0 to {known[0].max_streams - 1}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    skipped = skip_mask(known[0], stream)
    return AttentionCall(layer, stream, -1, q.detach(), k.detach(), None, scale, known[0].spec.tile, skipped)


def _fits(state: LayerState, q: Tensor, k: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] % max(1, k.shape[1]):
        return False
    _, batch, heads, *_ = state.spec.shape
    expected = (batch, heads, state.spec.q_len, batch, state.spec.k_len, q.shape[3])
    return (*q.shape[:3], k.shape[0], *k.shape[2:]) == expected


def _check_layer(model: nn.Module, layer: str) -> None:
    """Raise if the model has no rewritten layer of that name."""
    known = list(dict.fromkeys(state.layer for state in layer_states(model)))
    if not known:
        raise ValueError(
            f"layer is {layer!r}, but {type(model).__name__} has no layer that uses liteattention yet; call it "
            "compiled first, and see lite_compile.report()"
        )
    if layer not in known:
        names = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(f"layer is {layer!r}; allowed: {names}.{nearest(str(layer), known)}")


@torch.no_grad()
def attention_map(call: AttentionCall, batch: int = 0, head: int = 0) -> AttentionMap:
    """The dense softmax weights of one head in at most `MAX_CELLS` cells per side, and how much the skipped tiles hold.

    One tile of queries after another, in float32, on the device of `q`.
    """
    for name, value, size in (("batch", batch, call.q.shape[0]), ("head", head, call.q.shape[1])):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise ValueError(f"{name} is {value!r}; allowed: 0 to {size - 1}")
    q = call.q[batch, head].float()
    k = call.k[batch, head * call.k.shape[1] // call.q.shape[1]].float()
    q_len, k_len = q.shape[0], k.shape[0]
    rows, columns = tile_count(q_len, MAX_CELLS), tile_count(k_len, MAX_CELLS)
    bias = 0.0 if call.key_bias is None else call.key_bias[batch % call.key_bias.shape[0]]
    column = torch.arange(k_len, device=q.device) // columns
    row = torch.arange(q_len, device=q.device) // rows
    cells = q.new_zeros(tile_count(q_len, rows), tile_count(k_len, columns))
    counts = torch.outer(row.bincount(), column.bincount())
    lost = []
    for tile, skipped in enumerate(call.skipped[batch, head].to(q.device)):
        part = slice(tile * call.tile.q, min((tile + 1) * call.tile.q, q_len))
        # Where all keys are hidden, the weights are zeros, as `attend` has it.
        weights = (q[part] @ k.T * call.scale + bias).softmax(-1).nan_to_num(0.0)
        pooled = weights.new_zeros(weights.shape[0], cells.shape[1]).index_add_(1, column, weights)
        cells.index_add_(0, row[part], pooled)
        lost.append((weights * skipped.repeat_interleave(call.tile.k)[:k_len]).sum(1))
    mass = torch.cat(lost)
    return AttentionMap((cells / counts * k_len).cpu(), rows, columns, float(mass.mean()), float(mass.max()))
