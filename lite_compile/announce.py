"""Generations announced by the user: the clock of models whose graph shows neither latents nor timestep."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from .clock import ANNOUNCED, ANNOUNCED_EPOCH, ANNOUNCED_STEPS, GENERATION, STEP, TICKET, USED_TICKET, slot_table
from .ops import NOW_WORDS
from .trajectory import DenseSteps, fraction_of_steps, is_dense, is_refresh

_numbers, _tickets = itertools.count(1), itertools.count(1)
_lock = threading.Lock()
_active: list[Generation] = []


class Generation:
    """One generation, as `lite_compile.generation` hands it out."""

    def __init__(self, parameters: list[Tensor] | None, total_steps: int = 0) -> None:
        self._parameters = None if parameters is None else {id(parameter) for parameter in parameters}
        self._keep = parameters  # ids stay valid as long as the tensors live
        self._thread = threading.get_ident()
        self._number = next(_numbers)
        self._ticket = 0
        self._steps: dict[int, int] = {}
        self._stream: int | None = None
        self._clocks: list[Tensor] = []
        self._total_steps = total_steps
        self._told: list[Tensor] = []

    def step(self, stream: int = 0) -> None:
        """Announce that the next call of the model is the next denoising step of guidance stream `stream`.

        Needed only for models in which the report finds no clock; for all others it changes nothing. One announcement
        is good for one call: a call that was not announced uses no state.

        Raises:
            ValueError: `stream` is negative.
        """
        if isinstance(stream, bool) or not isinstance(stream, int) or stream < 0:
            raise ValueError(f"stream is {stream!r}; allowed: an integer >= 0")
        self._steps[stream] = self._steps.get(stream, -1) + 1
        self._stream, self._ticket = stream, next(_tickets)
        for clock in self._clocks:
            self._write(clock)

    def covers(self, anchor: int) -> bool:
        """Whether this generation speaks for the model that the parameter with id `anchor` belongs to.

        One that names no model speaks for all that its own thread runs.
        """
        if self._parameters is None:
            return self._thread == threading.get_ident()
        return anchor in self._parameters

    def attach(self, clock: Tensor) -> None:
        """Keep `clock` up to date from now on."""
        if not self.drives(clock):
            self._clocks.append(clock)
            self._write(clock)

    def tell_steps(self, clock: Tensor) -> None:
        """Let `clock`, which advances by itself, know how many steps there are, until this generation ends."""
        if self._total_steps and not any(clock is known for known in self._told):
            self._told.append(clock)
            _write_word(clock, ANNOUNCED_STEPS, self._total_steps)

    def tell_again(self, ended: Generation) -> None:
        """Tell the clocks that `ended`, a generation within this one, told another number of steps."""
        self._told = [clock for clock in self._told if not any(clock is known for known in ended._told)]

    def drives(self, clock: Tensor) -> bool:
        """Whether `clock` is kept up to date by this generation."""
        return any(clock is known for known in self._clocks)

    def restart(self) -> None:
        """Start over as another generation; calls use no state until the next `step`."""
        self._number = next(_numbers)
        self._steps.clear()
        self.close()

    def close(self) -> None:
        """The generation is over: calls after it use no state."""
        self._stream = None
        for clock in self._clocks:
            self._write(clock)
        for clock in self._told:
            _write_word(clock, ANNOUNCED_STEPS, 0)
        self._told.clear()

    def _write(self, clock: Tensor) -> None:
        header = clock_header(self._number, self._stream, self._steps, self._ticket, self._total_steps)
        with torch.inference_mode(False), torch.no_grad():
            clock[: len(header)].copy_(torch.tensor(header, dtype=torch.int32, device="cpu"), non_blocking=True)


def _write_word(clock: Tensor, word: int, value: int) -> None:
    with torch.inference_mode(False), torch.no_grad():
        clock[word].fill_(value)


def clock_header(number: int, stream: int | None, steps: dict[int, int], ticket: int, total_steps: int) -> list[int]:
    """First words of a clock that is announced rather than advanced, up to the one that the calls write."""
    header = [0] * USED_TICKET
    header[GENERATION] = number
    header[STEP] = steps.get(stream, 0) if stream is not None else 0
    header[ANNOUNCED] = 0 if stream is None else min(stream, 2**30) + 1  # such a stream has no slot, hence no state
    header[TICKET] = ticket
    header[ANNOUNCED_STEPS] = total_steps
    return header


def read_announced(
    clock: Tensor, max_streams: int, dense_steps: tuple[int | float, int | float] = (0, 0), refresh_every: int = 0
) -> Tensor:
    """In-graph counterpart of `clock.advance` for announced generations; same result, int32 `[NOW_WORDS]`."""
    generation, step = clock[GENERATION], clock[STEP]
    slot, announced = clock[ANNOUNCED] - 1, clock[TICKET] != clock[USED_TICKET]
    slot = torch.where(announced & (slot < max_streams), slot, -1)
    fraction = fraction_of_steps(step, clock[ANNOUNCED_STEPS])
    dense = is_dense(step, fraction, clock[ANNOUNCED_STEPS], DenseSteps(*dense_steps))
    taken = torch.arange(max_streams, dtype=torch.int32, device=clock.device) == slot
    table = slot_table(clock, max_streams)
    slot_generation, slot_step, slot_epoch, _, slot_began = table.unbind()
    begins = taken & (slot_generation != generation)
    renewed = begins | (taken & is_refresh(step, slot_step, refresh_every))
    epoch_count = clock[ANNOUNCED_EPOCH] + renewed.any().int()
    slot_epoch = torch.where(renewed, epoch_count, slot_epoch)
    epoch = torch.where(taken, slot_epoch, 0).sum(dtype=torch.int32)
    slot_began = torch.where(begins, epoch_count, slot_began)
    rows = [x.to(torch.int32).expand(max_streams) for x in (generation, step, slot_epoch, dense, slot_began)]
    table.copy_(torch.where(taken, torch.stack(rows), table))
    clock[ANNOUNCED_EPOCH].copy_(epoch_count)
    now = torch.stack([epoch, step, torch.where(dense, -1, slot), generation, fraction.view(torch.int32)])
    clock[USED_TICKET].copy_(clock[TICKET])
    assert now.shape == (NOW_WORDS,)
    return now.to(torch.int32)


def active_generation(anchors: Iterable[int]) -> Generation | None:
    """The innermost active generation that covers one of `anchors`, ids of parameters of a model; or None."""
    anchors = list(anchors)
    with _lock:
        covering = [g for g in _active if any(map(g.covers, anchors))]
        return covering[-1] if covering else None


def tell_steps(anchor: int, clock: Tensor) -> None:
    """Let `clock` know how many steps the active generation has, of the model with the parameter of that id."""
    generation = active_generation([anchor])
    if generation is not None:
        generation.tell_steps(clock)


def restart(clock: Tensor) -> None:
    """Restart the active generations that drive `clock`."""
    with _lock:
        driving = [g for g in _active if g.drives(clock)]
    for generation in driving:
        generation.restart()


def push(generation: Generation) -> None:
    """Activate a generation."""
    with _lock:
        _active.append(generation)


def pop(generation: Generation) -> None:
    """Deactivate and close a generation."""
    with _lock:
        _active.remove(generation)
        for around in _active:
            around.tell_again(generation)
    generation.close()
