"""Take the place of the kernels of one model's attention, for as long as a generation is observed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layer_state import bindings, layer_states
from ..ops import NOW_EPOCH, NOW_FRACTION, NOW_SLOT
from ..skip_state import COMPUTED_WORD, TileShape, row_layout, tile_count

Handler = Callable[[str, "AttendCall"], None]


@dataclass(frozen=True)
class AttendCall:
    """One call of the op, to be computed by a handler as it likes; `out` (and `lse`) have to be written."""

    kernel: ops.Kernel
    operands: tuple[Tensor, Tensor, Tensor]
    """q, k, v."""
    state: Tensor
    now: Tensor
    scale: float
    threshold: Tensor
    tile: TileShape
    out: Tensor
    lse: Tensor | None
    rest: tuple[Any, ...]
    named: dict[str, Any]
    epoch: int
    slot: int
    """That `state` does not have (-1): no state may be used."""
    fraction: float
    """Of the trajectory; negative where the clock does not know it."""
    marks: bool = True

    @property
    def uses_state(self) -> bool:
        """Whether this call may skip and mark tiles; layers of `dense_layers` may not."""
        return self.marks and 0 <= self.slot < self.state.shape[0]

    @property
    def criterion(self) -> str:
        """The option of that name."""
        given = self.named.get("criterion", self.rest[2] if len(self.rest) > 2 else "max")
        return str(given)

    @property
    def k_tiles(self) -> int:
        return tile_count(self.operands[1].shape[2], self.tile.k)

    @property
    def mask_start(self) -> int:
        """First word of a row of the state that holds skip bits."""
        return row_layout(self.k_tiles).mask_start

    def attend(self, threshold: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Attention under the mask in `rows` (`copy_rows`), or in the state, either of which is marked; gives `out`."""
        state, now = self.state, self.now
        if rows is not None:
            state, now = rows, self._now(0)
        return self._run(state, now, threshold, out)

    def attend_densely(self, out: Tensor | None = None) -> Tensor:
        """Attention with nothing skipped; leaves no mark."""
        return self._run(self.state, self._now(-1), self.threshold, out)

    def _run(self, state: Tensor, now: Tensor, threshold: Tensor, out: Tensor | None) -> Tensor:
        out = self.out if out is None else out
        self.kernel(
            *self.operands, state, now, self.scale, threshold, self.tile, out, self.lse, *self.rest, **self.named
        )
        return out

    def _now(self, slot: int) -> Tensor:
        with torch.inference_mode(False):
            now = self.now.clone()
            now[NOW_SLOT] = slot
        return now

    def copy_rows(self) -> Tensor:
        """What the stream remembers: int32 `[1, B, H, q_tiles, row_words]`."""
        with torch.inference_mode(False):
            return self.state[self.slot : self.slot + 1].clone()

    def density(self) -> float:
        """Share of the tiles that the stream's last call computed."""
        computed = self.state[self.slot, ..., COMPUTED_WORD]
        return int(computed.sum(dtype=torch.int64)) / (computed.numel() * self.k_tiles)


@contextmanager
def intercepted(model: nn.Module, handle: Handler) -> Iterator[None]:
    """Within the context, `handle(layer, call)` computes the rewritten attention of `model` in place of the kernels.

    Raises:
        RuntimeError: someone else does that already; or, at the end, the model's attention did not come by.
    """
    if ops.intercept is not None:
        raise RuntimeError("another calibration is running in this process; wait for it")
    names: dict[int, str | None] = {}
    dense: set[str] = set()
    seen = {"calls": 0, "captured": 0}

    def intercept(kernel: ops.Kernel) -> ops.Kernel:
        return partial(run, kernel)

    def run(
        kernel: ops.Kernel, q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float,
        threshold: Tensor, tile: TileShape, out: Tensor, lse: Tensor | None, *rest: Any, **named: Any,
    ) -> None:  # fmt: skip
        if state.is_cuda and torch.cuda.is_current_stream_capturing():
            seen["captured"] += 1  # nothing may be read back now; the error comes at the end
            return kernel(q, k, v, state, now, scale, threshold, tile, out, lse, *rest, **named)
        address = state.data_ptr()
        if address not in names:
            names[address] = next((s.layer for s in layer_states(model) if s.state.data_ptr() == address), None)
            dense.update(*(binding.thresholds.exact for binding in bindings(model)))
        layer = names[address]
        if layer is None:
            return kernel(q, k, v, state, now, scale, threshold, tile, out, lse, *rest, **named)
        seen["calls"] += 1
        words = now.tolist()
        (fraction,) = struct.unpack("f", struct.pack("i", words[NOW_FRACTION]))
        call = AttendCall(
            kernel, (q, k, v), state, now, scale, threshold, tile, out, lse, rest, named, words[NOW_EPOCH],
            words[NOW_SLOT], fraction, layer not in dense,
        )  # fmt: skip
        with torch.no_grad():
            handle(layer, call)

    before = _calls(model)
    ops.intercept = intercept
    try:
        yield
    finally:
        ops.intercept = None
    if seen["captured"] or (not seen["calls"] and _calls(model) > before):
        raise RuntimeError(
            "the attention of this model runs in CUDA graphs, which pass calibration by: compile it without "
            "mode='reduce-overhead' (or 'max-autotune') to calibrate; the thresholds are good for both"
        )
    if not seen["calls"]:
        raise RuntimeError(
            f"no attention of {type(model).__name__} ran through liteattention during run(): compile the model with "
            "torch.compile(..., backend='liteattention') first, let run() call what was compiled, under "
            "torch.no_grad(), and pass the denoiser itself, for example pipe.transformer; lite_compile.report() says "
            "which attention was rewritten, and why not"
        )


def _calls(model: nn.Module) -> int:
    return sum(binding.calls for binding in bindings(model))
