"""What the step clock's kernels read of a call's inputs: samples of the latents, projections of the conditioning.

`clock.sample_latents`, `correlate_latents` and `identify` are the specification. Projections are sums of the same terms
in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import clock as specification

SAMPLES, PROJECTIONS = tl.constexpr(specification.LATENT_SAMPLES), tl.constexpr(specification.PROJECTIONS)
HEADER_WORDS = tl.constexpr(specification.HEADER_WORDS)
LARGEST_FLOAT, LARGEST_DOUBLE = (tl.constexpr(torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64))
VERDICTS, COSINE, IDENTICAL, DIFFERS, FINITE = map(tl.constexpr, (4, 0, 1, 2, 3))
"""How many numbers `compare_latents` finds of a latent, and which."""
_NO_COSINE = tl.constexpr(-2.0)
"""Below every threshold, as the NaN of an entry that did not move is."""
_DIGIT_BITS, _WEIGHT_BITS = tl.constexpr(specification.DIGIT_BITS), tl.constexpr(specification.WEIGHT_BITS)
_DROPPED_BITS, _HASHES = tl.constexpr(specification.DROPPED_BITS), tl.constexpr(specification.HASHES)
_LARGE, _LARGE_CODE, _NAN_CODE = map(
    tl.constexpr, (specification.LARGE, specification.LARGE_CODE, specification.NAN_CODE)
)


@triton.jit(
    do_not_specialize=["number", "size", "entries", "share", "span", "slots"],
    do_not_specialize_on_alignment=["x", "clock", "samples", "verdicts"],
)
def compare_latents(
    x, clock, samples, verdicts, number, size, entries, share, span, slots, IS_LARGE: tl.constexpr
):  # fmt: skip
    """Sample one latent, and compare the samples with those of the last call and of the generation's first one.

    Args:
        x: the latent, `size` elements (int32 or int64), of which `entries` parts of equal size are judged one by one.
        samples: float32 `[LATENT_SAMPLES]`, of which those from `number * share` on are written: `share` of the latent,
            and zeros up to `span`.
        verdicts: float32 `[latents, 4]`, of which row `number` is written: smallest cosine, whether all equal the last
            call's, whether any differs from the first call's, whether all are finite.
        slots: words of the clock's slot table.
        IS_LARGE: whether positions need 64 bits.
    """
    start = number * share
    verdicts += VERDICTS * number
    index = tl.arange(0, SAMPLES)
    inside = index < share
    if IS_LARGE:
        size, index = size.to(tl.int64), index.to(tl.int64)
    stride = (size + share - 1) // share
    position = (index * stride + (index * 40503 // 8) % stride) % size
    now = tl.load(x + position, mask=inside, other=0).to(tl.float32)
    stored = clock + HEADER_WORDS + slots + start + index
    last = tl.load(stored, mask=index < span, other=0).to(tl.float32, bitcast=True)
    first = tl.load(stored + SAMPLES, mask=index < span, other=0).to(tl.float32, bitcast=True)
    changed = now != last
    moved, was = tl.where(changed, now, 0.0), tl.where(changed, last, 0.0)
    owner = position // ((size + entries - 1) // entries)
    cosine = 2.0
    for entry in range(entries):
        own = inside & (owner == entry)
        dot = tl.sum(tl.where(own, moved * was, 0.0), 0)
        squares = tl.sum(tl.where(own, moved * moved, 0.0), 0)
        last_squares = tl.sum(tl.where(own, was * was, 0.0), 0)
        found = dot / (tl.sqrt(squares) * tl.sqrt(last_squares))
        cosine = tl.minimum(cosine, tl.where(found == found, found, _NO_COSINE))
    differs = tl.where(index < span, (now != first).to(tl.int32), 0)
    unequal = tl.where(index < span, changed.to(tl.int32), 0)
    infinite = 1 - (tl.abs(now) <= LARGEST_FLOAT).to(tl.int32)
    tl.store(samples + start + index, now, mask=index < span)
    tl.store(verdicts + COSINE, cosine)
    tl.store(verdicts + IDENTICAL, 1.0 - tl.max(unequal, 0))
    tl.store(verdicts + DIFFERS, tl.max(differs, 0).to(tl.float32))
    tl.store(verdicts + FINITE, 1.0 - tl.max(infinite, 0))


@triton.jit
def _tame(x, LARGEST: tl.constexpr):
    """`clock._tame`. The logarithms are taken only where there is a number that needs one."""
    size = tl.minimum(tl.abs(x), LARGEST)
    size = tl.where(x == x, size, 0.0)
    if tl.max(size, 0) > _LARGE:
        code = _LARGE_CODE + tl.log2(tl.maximum(size, 1.0))
        x = tl.where(size > _LARGE, tl.where(x < 0, -code, code), x)
    return tl.where(x == x, x, _NAN_CODE)


@triton.jit(do_not_specialize=["number", "size"], do_not_specialize_on_alignment=["x", "partials"])
def project(x, partials, number, size, BLOCK: tl.constexpr, IS_WIDE: tl.constexpr):
    """This program's part of the projections of `x` `[size]`, which is input `number`; `size` is int32 or int64.

    partials: float64 `[inputs, programs, PROJECTIONS]`.
    IS_WIDE: whether float32 does not hold all that the dtype of `x` does.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(size.to(tl.int64), BLOCK).to(tl.int32)  # what is added to round up may not fit 32 bits
    per_program = tl.cdiv(blocks, tl.num_programs(0))
    place = tl.arange(0, BLOCK).to(tl.int64)
    sum_0 = tl.zeros([BLOCK], tl.float64)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    for block in range(program * per_program, tl.minimum((program + 1) * per_program, blocks)):
        index = (tl.zeros_like(place) + block) * BLOCK + place
        value = tl.load(x + index, mask=index < size, other=0)
        if IS_WIDE:
            value = _tame(value.to(tl.float64), LARGEST_DOUBLE)
        else:
            value = _tame(value.to(tl.float32), LARGEST_FLOAT).to(tl.float64)
        low = (index & (2**_DIGIT_BITS - 1)).to(tl.int32)
        middle = ((index >> _DIGIT_BITS) & (2**_DIGIT_BITS - 1)).to(tl.int32)
        high = (index >> (2 * _DIGIT_BITS)).to(tl.int32)
        sum_0 += value * _weight(low, middle, high, 0)
        sum_1 += value * _weight(low, middle, high, 1)
        sum_2 += value * _weight(low, middle, high, 2)
        sum_3 += value * _weight(low, middle, high, 3)
    partials += (number * tl.num_programs(0) + program) * PROJECTIONS
    tl.store(partials, tl.sum(sum_0, 0))
    tl.store(partials + 1, tl.sum(sum_1, 0))
    tl.store(partials + 2, tl.sum(sum_2, 0))
    tl.store(partials + 3, tl.sum(sum_3, 0))


@triton.jit
def _weight(low, middle, high, NUMBER: tl.constexpr):
    """float64 weights of one projection."""
    hashed = low * _HASHES[NUMBER][0] + middle * _HASHES[NUMBER][1] + high * _HASHES[NUMBER][2]
    return (((hashed >> _DROPPED_BITS) & (2**_WEIGHT_BITS - 1)) + 1).to(tl.float64)
