"""The step clock: which step, which guidance stream, which generation is this call of the model?

One clock per model, an int32 tensor on the model's device. `advance` runs inside the compiled graph, once per call, and
decides without any host synchronisation. Every doubt ends in a stream with an empty mask, or in no stream at all, both
of which compute everything: a mistake of the clock costs sparsity, never a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Words of the header.
GENERATION, STEP, SLOT, CALLS, DENSE_CALLS, RESET, DIRECTION, TIMESTEP, NUMEL, EPOCH, ANNOUNCED = range(11)
_HEADER = 16

LATENT_SAMPLES = 4096
CONDITION_GROUPS, PROJECTIONS = 16, 4
_MULTIPLIERS = ((5471, 7919), (3571, 2741), (7001, 5323), (1993, 6151))
CONDITION_WORDS = CONDITION_GROUPS * PROJECTIONS

NEXT_STEP_COSINE = 0.5
"""Latents of consecutive steps correlate at least 0.7 even in a 2-step run; unrelated ones stay within +-0.05."""
SAME_TIMESTEP_COSINE = 0.98
"""A second evaluation at one timestep (Heun, rounded timesteps) moves latents little, another noise more."""
FIRST_ASCENT_COSINE = 0.9
"""Models whose time runs upwards are believed when their first step also looks like one."""


def clock_words(max_streams: int) -> int:
    """Length of the int32 clock tensor."""
    return _HEADER + 3 * max_streams + 2 * LATENT_SAMPLES + max_streams * CONDITION_WORDS


def slot_table(clock: Tensor, max_streams: int) -> Tensor:
    """int32 `[3, max_streams]`: per slot its generation, the step it was last used in, and its epoch."""
    return clock[_HEADER : _HEADER + 3 * max_streams].view(3, max_streams)


def sample(x: Tensor, count: int) -> Tensor:
    """`count` values of `x` as float32, spread over all of it at irregular distances (no fixed channel or column)."""
    flat = x.reshape(-1)
    size = flat.shape[0]
    index = torch.arange(count, device=x.device)
    stride = (size + count - 1) // count
    # Inductor computes indices in 32 bits, so every product has to fit.
    return flat[(index * stride + (index * 40503 // 8) % stride) % size].float()


def identify(conditions: Sequence[Tensor], device: torch.device) -> Tensor:
    """Fingerprint of a call's conditioning: float32 `[CONDITION_WORDS]` pseudo-random projections of every element.

    Prompts that differ in their last word differ in one token out of hundreds, so samples would not do.
    """
    groups = [torch.zeros(PROJECTIONS, device=device)] * CONDITION_GROUPS
    for number, x in enumerate(conditions):
        flat = x.reshape(-1).float()
        index = torch.arange(flat.shape[0], device=device)
        low, high = index % 4093, index // 4093 % 4093
        # Hashes of the position, in products that fit 32 bits: Inductor computes indices in no more.
        hashed = [(low * a + high * b + number * 6673) % 2039 for a, b in _MULTIPLIERS]
        sums = torch.stack([((h.float() / 1019.0 - 1.0) * flat).sum() for h in hashed])
        groups[number % CONDITION_GROUPS] = groups[number % CONDITION_GROUPS] + sums
    return torch.cat(groups)


def advance(clock: Tensor, latents: Tensor, timestep: Tensor, conditions: Sequence[Tensor], max_streams: int) -> Tensor:
    """Advance `clock` in place by one call of the model and say where that call stands.

    - *Same step, next guidance stream*: the latents equal the previous call's, and so does the timestep.
    - *Next step*: the latents moved but still correlate with the previous call's, the timestep did not turn back, and
      this is not where the generation started.
    - *New generation*: anything else, or a reset asked for by the user. All masks are void.

    A stream is known by its conditioning (every model input that is neither latents nor timestep): a mask is never used
    under another prompt. Calls with equal conditioning within one step are told apart by their order.

    Args:
        clock: int32 `[clock_words(max_streams)]`.
        latents: the noisy input of the model, any shape.
        timestep: any shape, integer or float; its maximum counts (per-token timesteps zero the given frames).
        conditions: all other inputs of the model.

    Returns:
        int32 `[4]`: epoch (unique per stream and generation), step, slot (-1: use no state), generation.
    """
    slots = slot_table(clock, max_streams)
    slot_generation, slot_step, slot_epoch = slots[0], slots[1], slots[2]
    stored = clock[_HEADER + 3 * max_streams :].view(torch.float32)
    last, first, known = stored.split([LATENT_SAMPLES, LATENT_SAMPLES, max_streams * CONDITION_WORDS])
    known = known.view(max_streams, CONDITION_WORDS)

    now = sample(latents, LATENT_SAMPLES)
    t = timestep.float().max()
    last_t = clock[TIMESTEP].view(torch.float32)
    started = (clock[GENERATION] > 0) & (clock[RESET] == 0) & (clock[NUMEL] == latents.numel() % 2**31)

    # Samples that did not move at all belong to conditioning channels; they say nothing about the noise.
    changed = now != last
    moved, was = torch.where(changed, now, 0.0), torch.where(changed, last, 0.0)
    cosine = (moved * was).sum() / ((moved * moved).sum().sqrt() * (was * was).sum().sqrt())
    delta = torch.sign(t - last_t).to(torch.int32)
    direction = clock[DIRECTION]
    bound = torch.where(
        delta == 0,
        SAME_TIMESTEP_COSINE,
        torch.where((delta > 0) & (direction == 0), FIRST_ASCENT_COSINE, NEXT_STEP_COSINE),
    )
    identical = ~changed.any()
    same_step = started & identical & (delta == 0)
    next_step = started & ~identical & (delta * direction >= 0) & (now != first).any() & (cosine >= bound)
    next_step = next_step & torch.isfinite(t) & torch.isfinite(last_t) & torch.isfinite(now).all()
    new = ~(same_step | next_step)

    generation = clock[GENERATION] + new.int()
    step = torch.where(new, 0, clock[STEP] + next_step.int())
    direction = torch.where(new, 0, torch.where(direction == 0, delta, direction))

    condition = identify(conditions, clock.device)
    number = torch.arange(max_streams, dtype=torch.int32, device=clock.device)
    current = slot_generation == generation
    matches = current & (slot_step < step) & (known == condition).all(1)
    # A slot left out of the whole previous step may be taken over: its epoch changes, so its old mask is void.
    idle = current & (slot_step < step - 1)
    rank = torch.where(matches, 0, torch.where(~current, 1, torch.where(idle, 2, 3)))
    best = (rank * max_streams + number).min()
    usable = best < 3 * max_streams
    slot = torch.where(usable, best % max_streams, -1).to(torch.int32)
    taken = number == slot
    fresh = usable & (best >= max_streams)
    epoch_count = clock[EPOCH] + fresh.int()
    slot_epoch = torch.where(taken & fresh, epoch_count, slot_epoch)
    epoch = torch.where(taken, slot_epoch, 0).sum(dtype=torch.int32)

    header = torch.stack(
        [
            generation,
            step,
            slot,
            clock[CALLS] + 1,
            clock[DENSE_CALLS] + (slot < 0).int(),
            torch.zeros_like(step),
            direction,
            t.view(torch.int32),
            torch.full_like(step, latents.numel() % 2**31),
            epoch_count,
        ]
    ).to(torch.int32)
    updated = torch.cat(
        [
            header,
            clock[len(header) : _HEADER],
            torch.where(taken, generation, slot_generation).to(torch.int32),
            torch.where(taken, step, slot_step).to(torch.int32),
            slot_epoch.to(torch.int32),
            now.view(torch.int32),
            torch.where(new, now, first).view(torch.int32),
            torch.where((taken & fresh)[:, None], condition, known).reshape(-1).view(torch.int32),
        ]
    )
    clock.copy_(updated)
    return torch.stack([epoch, step, slot, generation]).to(torch.int32)
