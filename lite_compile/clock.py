"""The step clock: which step, which guidance stream, which generation is this call of the model?

One clock per model, an int32 tensor on the model's device. `advance` runs inside the compiled graph, once per call, and
decides without any host synchronisation. Every doubt that it sees ends in a stream with an empty mask, or in no stream,
both of which compute everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .clock_op import advance_by_kernels
from .trajectory import DenseSteps, fraction_of, is_dense, is_refresh, time_scale

# Words of the header. The last five are `announce`'s.
GENERATION, STEP, SLOT, CALLS, DENSE_CALLS, RESET, TIMESTEP, NUMEL, EPOCH, UNDECIDED, DIRECTION = range(11)
FIRST_TIMESTEP, TIME_SCALE, LAST_STEPS = 11, 12, 13
ANNOUNCED_STEPS, ANNOUNCED, TICKET, USED_TICKET, ANNOUNCED_EPOCH = 14, 15, 16, 17, 18
HEADER_WORDS = 20
SLOT_ROWS = 5

LATENT_SAMPLES = 4096
PROJECTIONS = 4
CONDITION_WORDS = 2 * PROJECTIONS
"""int32 words of the fingerprint of one input: float64 projections."""
DIGIT_BITS, WEIGHT_BITS, DROPPED_BITS = 12, 13, 9
HASHES = ((92821, 68371, 75503), (81869, 99371, 53113), (104651, 88001, 67801), (72271, 110581, 96001))
"""Per projection: multipliers for the three digits of a position. The middle bits of the sum are its weight."""
LARGE, LARGE_CODE, NAN_CODE = 2.0**40, 4096.0, 3000.5
"""Numbers beyond `LARGE` count as `LARGE_CODE` plus their log2, so that a mask of infinities hides nothing else."""

NEXT_STEP_COSINE = 0.5
"""Latents of consecutive steps correlate better in runs of eight steps or more; unrelated ones stay within +-0.3."""
SAME_TIMESTEP_COSINE = 0.98
"""A second evaluation at one timestep (Heun, rounded timesteps) moves latents little, another noise more."""
RISING_COSINE = 0.9
"""At the second step of a generation, which shows whether its time falls or rises (Lumina, Mochi, Z-Image).

Most times fall, and then a rise is a new generation.
"""
PERHAPS_RISING = 2
"""What `DIRECTION`, else -1, 0 or 1, is if a generation began where time rose and the latents moved further than that.

If that was a second step, a fall would be the restart of the run.
"""
MAX_ENTRIES = 32
"""Batch entries are judged one by one; of more than this many, neighbours are judged together."""


def clock_words(max_streams: int, conditions: int) -> int:
    """Length of the int32 tensor of a clock that watches that many conditioning inputs."""
    return (
        HEADER_WORDS + SLOT_ROWS * max_streams + 2 * LATENT_SAMPLES + max_streams * max(1, conditions) * CONDITION_WORDS
    )


def slot_table(clock: Tensor, max_streams: int) -> Tensor:
    """int32 `[5, max_streams]`: per slot its generation, the step it was last used in, its epoch, 1 if that step was
    one of the dense ones, and the epoch that its stream began with, an earlier one if marks were refreshed since."""
    return clock[HEADER_WORDS : HEADER_WORDS + SLOT_ROWS * max_streams].view(SLOT_ROWS, max_streams)


def sample_positions(size: int, count: int, device: torch.device) -> Tensor:
    """int64 `[count]`: ascending positions spread over `size`, at irregular distances (no fixed channel or column)."""
    index = torch.arange(count, device=device)
    stride = (size + count - 1) // count
    # Inductor computes indices in 32 bits, so every product has to fit.
    return (index * stride + (index * 40503 // 8) % stride) % size


def sample(x: Tensor, count: int) -> Tensor:
    """`count` values of `x` as float32, spread over all of it."""
    flat = x.reshape(-1)
    return flat[sample_positions(flat.shape[0], count, x.device)].float()


def identify(conditions: Sequence[Tensor | int | float], device: torch.device) -> Tensor:
    """Fingerprint of a call's conditioning: `CONDITION_WORDS` int32 per input, projections of every element in float64.

    Prompts that differ in their last word differ in one token out of hundreds, so samples would not do.
    """
    fingerprints = []
    for condition in conditions or (0,):
        if not isinstance(condition, Tensor):
            condition = torch.full((1,), condition, dtype=torch.float64, device=device)
        if condition.is_complex():
            condition = torch.view_as_real(condition.resolve_conj())
        flat = condition.to(device).reshape(-1)
        # float32 holds all that 16 bits do, and computes several times faster.
        flat = _tame(flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat.to(torch.float64))
        index = torch.arange(flat.shape[0], device=device)
        # A weight is a hash of the position's digits, in products that fit 32 bits, since Inductor has no more.
        mask = 2**DIGIT_BITS - 1
        low, middle, high = index & mask, (index >> DIGIT_BITS) & mask, index >> 2 * DIGIT_BITS
        sums = [low * a + middle * b + high * c for a, b, c in HASHES]
        hashed = [(x >> DROPPED_BITS) & (2**WEIGHT_BITS - 1) for x in sums]
        fingerprints.append(torch.stack([((h.to(torch.float64) + 1) * flat.to(torch.float64)).sum() for h in hashed]))
    return torch.cat(fingerprints).view(torch.int32)


def _tame(x: Tensor) -> Tensor:
    """`x`, float64 or float32, with what would swallow all else in a sum replaced by small numbers that tell it."""
    size = x.abs().clamp(max=torch.finfo(x.dtype).max)
    x = torch.where(size > LARGE, x.sign() * (LARGE_CODE + size.clamp(min=1.0).log2()), x)
    return torch.where(x.isnan(), NAN_CODE, x)


def sample_latents(latents: Sequence[Tensor]) -> Tensor:
    """`LATENT_SAMPLES` values of all latents, as many of each; zeros where these are too few."""
    share = LATENT_SAMPLES // len(latents)
    samples = [sample(x, share).to(latents[0].device) for x in latents]
    return torch.cat([*samples, samples[0].new_zeros(LATENT_SAMPLES - share * len(latents))])


def correlate_latents(now: Tensor, last: Tensor, latents: Sequence[Tensor]) -> Tensor:
    """`correlate` for the samples of several latents: the smallest cosine."""
    share = LATENT_SAMPLES // len(latents)
    parts = zip(now.split(share), last.split(share), latents, strict=False)
    return torch.stack([correlate(*part) for part in parts]).amin()


def correlate(now: Tensor, last: Tensor, latents: Tensor) -> Tensor:
    """Smallest cosine between two sets of samples among the entries of a batch; NaN where an entry did not move.

    Samples that did not change at all are left out: they belong to conditioning that is concatenated to the latents,
    and say nothing about the noise.
    """
    size, entries = latents.numel(), torch.sym_min(latents.shape[0], MAX_ENTRIES)
    changed = now != last
    moved, was = torch.where(changed, now, 0.0), torch.where(changed, last, 0.0)
    owner = sample_positions(size, now.shape[0], now.device) // ((size + entries - 1) // entries)
    inside = owner == torch.arange(entries, device=now.device)[:, None]

    def total(values: Tensor) -> Tensor:
        return torch.where(inside, values, 0.0).sum(1)

    return (total(moved * was) / (total(moved * moved).sqrt() * total(was * was).sqrt())).amin()


def advance(
    clock: Tensor,
    latents: Tensor | Sequence[Tensor],
    timestep: Tensor,
    conditions: Sequence[Tensor | int | float],
    max_streams: int,
    dense_steps: tuple[int | float, int | float] = (0, 0),
    refresh_every: int = 0,
) -> Tensor:
    """Advance `clock` in place by one call of the model and say where that call stands.

    - *Same step, next guidance stream*: the latents equal the previous call's, and so does the timestep.
    - *Next step*: the latents of every batch entry moved but still correlate with the previous call's, the timestep
      fell (or rose, if it does so from the generation's beginning on), and this is not where the generation started.
    - *Undecided*: the latents moved a little while the timestep stood still. A second evaluation at one time (Heun,
      rounded timesteps) looks like this, and so does a prompt that was mixed into the latents: the call uses no state.
    - *New generation*: anything else, a first step that comes again, or a reset asked for by the user. All masks are
      void.

    A stream is known by its conditioning, every input of the graph that is neither latents, timestep nor a parameter: a
    mask is never used under another prompt. Calls of one step with equal conditioning are told apart by their order.

    Args:
        clock: int32 `[clock_words(max_streams, len(conditions))]`.
        latents: the noisy input of the model, any shape; or several that are denoised together.
        timestep: any shape, integer or float; its maximum counts (per-token timesteps zero the given frames).
        conditions: all other inputs of the graph, tensors of any dtype and device, and numbers.
        dense_steps: `trajectory.DenseSteps`. They use no state, but their stream keeps its slot and so its mask.
        refresh_every: every so many steps a stream gets another epoch, which voids its mask; 0: never.

    Returns:
        int32 `[5]`: epoch (unique per stream, generation and refresh), step, slot (-1: use no state), generation, and
        the bits of a float32: the fraction of the trajectory (`trajectory.fraction_of`).
    """
    latents = (latents,) if isinstance(latents, Tensor) else latents
    if clock.is_cuda:
        rules = (max_streams, DenseSteps(*dense_steps), refresh_every)
        return advance_by_kernels(clock, latents, timestep, conditions, *rules)
    slots = slot_table(clock, max_streams)
    slot_generation, slot_step, slot_epoch, slot_dense, slot_began = slots.unbind()
    stored = clock[HEADER_WORDS + SLOT_ROWS * max_streams :].view(torch.float32)
    last, first = stored[:LATENT_SAMPLES], stored[LATENT_SAMPLES : 2 * LATENT_SAMPLES]
    known = stored[2 * LATENT_SAMPLES :].view(torch.int32).view(max_streams, -1)

    numel = sum(x.numel() for x in latents) % 2**31
    now = sample_latents(latents).to(clock.device)
    t = timestep.float().max().to(clock.device)
    last_t = clock[TIMESTEP].view(torch.float32)
    started = (clock[GENERATION] > 0) & (clock[RESET] == 0) & (clock[NUMEL] == numel)

    delta = t - last_t
    identical = (now == last).all()
    cosine = correlate_latents(now, last, latents)
    moved = started & ~identical & (now != first).any()
    moved = moved & torch.isfinite(t) & torch.isfinite(last_t) & torch.isfinite(now).all()
    condition = identify(conditions, clock.device)
    known_now = (known == condition).all(1)

    moved_on = moved & (cosine >= NEXT_STEP_COSINE)
    direction = clock[DIRECTION]
    falls = (delta < 0) & ((direction == 0) | (direction == -1))
    rises = (delta > 0) & ((direction == 1) | ((direction != -1) & (cosine >= RISING_COSINE)))
    next_step = moved_on & (falls | rises)
    perhaps_rising = moved_on & (delta > 0) & ((direction == 0) | (direction == PERHAPS_RISING))
    # A timestep may be evaluated twice, but not the first one of a generation: that would be a restart.
    again = moved & (delta == 0) & (cosine >= SAME_TIMESTEP_COSINE) & (clock[STEP] > 0)
    # The first step under the same conditioning once more: a run that was aborted begins anew.
    seen = (known_now & (slot_generation == clock[GENERATION]) & (slot_step == clock[STEP])).any()
    same_step = started & identical & (delta == 0) & ~((clock[STEP] == 0) & seen)
    undecided = again | (same_step & (clock[UNDECIDED] != 0))
    new = ~(same_step | next_step | again)

    generation = clock[GENERATION] + new.int()
    step = torch.where(new, 0, clock[STEP] + next_step.int())
    direction = torch.where(
        new, PERHAPS_RISING * perhaps_rising.int(), torch.where(next_step, delta.sign().int(), direction)
    )
    first_t = torch.where(new, t, clock[FIRST_TIMESTEP].view(torch.float32))
    scale = torch.where(direction == 1, time_scale(t, first_t, clock[TIME_SCALE].view(torch.float32)), 0.0)
    fraction = fraction_of(t, first_t, direction, scale, step)
    last_steps = torch.where(new & (clock[GENERATION] > 0), clock[STEP] + 1, clock[LAST_STEPS])
    steps = torch.where(clock[ANNOUNCED_STEPS] > 0, clock[ANNOUNCED_STEPS], last_steps)
    dense = is_dense(step, fraction, steps, DenseSteps(*dense_steps))

    number = torch.arange(max_streams, dtype=torch.int32, device=clock.device)
    current = slot_generation == generation
    matches = current & (slot_step < step) & known_now
    # A slot left out of the whole previous step may be taken over: its epoch changes, so its old mask is void.
    idle = current & (slot_step < step - 1)
    rank = torch.where(matches, 0, torch.where(~current, 1, torch.where(idle, 2, 3)))
    best = (rank * max_streams + number).min()
    usable = (best < 3 * max_streams) & ~undecided
    slot = torch.where(usable, best % max_streams, -1).to(torch.int32)
    taken = number == slot
    fresh = usable & (best >= max_streams)
    begins = taken & fresh
    renewed = begins | (taken & is_refresh(step, slot_step, refresh_every))
    epoch_count = clock[EPOCH] + renewed.any().int()
    slot_epoch = torch.where(renewed, epoch_count, slot_epoch)
    epoch = torch.where(taken, slot_epoch, 0).sum(dtype=torch.int32)
    used_slot = torch.where(dense, -1, slot)

    header = {
        GENERATION: generation,
        STEP: step,
        SLOT: slot,
        CALLS: clock[CALLS] + 1,
        DENSE_CALLS: clock[DENSE_CALLS] + (used_slot < 0).int(),
        RESET: torch.zeros_like(step),
        TIMESTEP: t.view(torch.int32),
        NUMEL: torch.full_like(step, numel),
        EPOCH: epoch_count,
        UNDECIDED: undecided,
        DIRECTION: direction,
        FIRST_TIMESTEP: first_t.view(torch.int32),
        TIME_SCALE: scale.view(torch.int32),
        LAST_STEPS: last_steps,
    }
    updated = torch.cat(
        [
            torch.stack([header.get(word, clock[word]).to(torch.int32) for word in range(HEADER_WORDS)]),
            torch.where(taken, generation, slot_generation).to(torch.int32),
            torch.where(taken, step, slot_step).to(torch.int32),
            slot_epoch.to(torch.int32),
            torch.where(taken, dense, slot_dense).to(torch.int32),
            torch.where(begins, epoch_count, slot_began).to(torch.int32),
            now.view(torch.int32),
            torch.where(new, now, first).view(torch.int32),
            torch.where(begins[:, None], condition, known).reshape(-1),
        ]
    )
    clock.copy_(updated)
    return torch.stack([epoch, step, used_slot, generation, fraction.view(torch.int32)]).to(torch.int32)
