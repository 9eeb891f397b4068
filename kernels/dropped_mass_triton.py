"""The softmax mass that a call skips, on sampled rows, on NVIDIA GPUs: each program reads a part of one head's keys.

`lite_compile.dropped_mass` is the specification. Nothing of the size of the scores is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropped_mass import SAMPLED_ROWS, STRIDE_OF_HEADS, STRIDE_OF_STEPS
from ..ops import LOG2_E, NOW_EPOCH, NOW_SLOT, NOW_STEP
from ..skip_state import TileShape, row_layout, tile_count
from .visit_lists import EPOCH

_ROWS, _LOG2_E = tl.constexpr(SAMPLED_ROWS), tl.constexpr(LOG2_E)
_HEAD_STRIDE, _STEP_STRIDE = tl.constexpr(STRIDE_OF_HEADS), tl.constexpr(STRIDE_OF_STEPS)
_NOW_EPOCH, _NOW_STEP, _NOW_SLOT = tl.constexpr(NOW_EPOCH), tl.constexpr(NOW_STEP), tl.constexpr(NOW_SLOT)
_KEYS = tl.constexpr(64)
"""Keys that are multiplied at once."""
PROGRAMS = 1024
"""About as many as fill a GPU."""
LAUNCH = {"num_warps": 4, "num_stages": 2}


@triton.jit(
    do_not_specialize=["streams", "heads", "heads_per_kv", "q_len", "k_len", "q_tiles", "row_words", "mask_start"]
)
def _dropped_mass_kernel(
    q, k, key_bias, state, now, parts,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d, bias_stride_b,
    streams, heads, heads_per_kv, q_len, k_len, q_tiles, row_words, mask_start, keys_per_part, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The sampled rows of one head over a part of the keys.

    Args:
        parts: float32 `[heads of all batch entries, parts, 3, rows]`: maximum, sum of weights, sum of skipped weights.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    epoch, step, slot = tl.load(now + _NOW_EPOCH), tl.load(now + _NOW_STEP), tl.load(now + _NOW_SLOT)
    recorded = (slot >= 0) & (slot < streams)

    number = tl.arange(0, _ROWS)
    stride = tl.cdiv(q_len, _ROWS)
    shift = (program.to(tl.int64) * _HEAD_STRIDE % stride + step.to(tl.int64) * _STEP_STRIDE % stride) % stride
    row = tl.minimum(number.to(tl.int64) * q_len // _ROWS + shift, q_len - 1)
    program_rows = (tl.where(recorded, slot, 0).to(tl.int64) * tl.num_programs(0) + program) * q_tiles
    words = state + (program_rows + row // TILE_Q) * row_words
    valid = recorded & (tl.load(words + EPOCH) == epoch)
    words += mask_start

    dim = tl.arange(0, BLOCK_D)
    inside = dim < HEAD_DIM
    q += batch * q_stride_b + head * q_stride_h
    k += batch * k_stride_b + head // heads_per_kv * k_stride_h
    rows = tl.load(q + row[:, None] * q_stride_s + dim[None, :] * q_stride_d, mask=inside[None, :], other=0.0)
    running = tl.full([_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([_ROWS], tl.float32)
    dropped = tl.zeros([_ROWS], tl.float32)
    begin = part * keys_per_part
    for start in range(begin, tl.minimum(begin + keys_per_part, k_len), _KEYS):
        key = start + tl.arange(0, _KEYS)
        live = key < k_len
        places = key.to(tl.int64)[:, None] * k_stride_s + dim[None, :] * k_stride_d
        keys = tl.load(k + places, mask=live[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(rows, tl.trans(keys), input_precision="tf32x3") * qk_scale
        if HAS_BIAS:
            bias = tl.load(key_bias + batch * bias_stride_b + key, mask=live, other=0.0)
            scores += (bias * _LOG2_E)[None, :]
        scores = tl.where(live[None, :], scores, float("-inf"))
        tile = key // TILE_K
        word = tl.load(words[:, None] + (tile // 32)[None, :], mask=live[None, :], other=0)
        skipped = ((tl.where(valid[:, None], word, 0) >> (tile % 32)[None, :]) & 1) == 1
        raised = tl.maximum(running, tl.max(scores, 1))
        shift_by = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - shift_by[:, None])
        decay = tl.exp2(running - shift_by)
        total = total * decay + tl.sum(weights, 1)
        dropped = dropped * decay + tl.sum(tl.where(skipped, weights, 0.0), 1)
        running = raised
    parts += (program.to(tl.int64) * tl.num_programs(1) + part) * 3 * _ROWS + number
    tl.store(parts, running)
    tl.store(parts + _ROWS, total)
    tl.store(parts + 2 * _ROWS, dropped)


def dropped_mass_triton(
    q: Tensor, k: Tensor, state: Tensor, now: Tensor, scale: float, tile: TileShape, key_bias: Tensor | None = None
) -> Tensor:
    """float32 `[2]`: mean and maximum over the sampled rows; arguments as `attend` takes them."""
    batch, heads, q_len, head_dim = q.shape
    k_len = k.shape[2]
    parts = min(triton.cdiv(PROGRAMS, batch * heads), triton.cdiv(k_len, 8 * _KEYS.value))
    keys_per_part = triton.cdiv(triton.cdiv(k_len, parts), _KEYS.value) * _KEYS.value
    parts = triton.cdiv(k_len, keys_per_part)
    key_bias = None if key_bias is None else key_bias.contiguous()
    found = q.new_empty((batch * heads, parts, 3, SAMPLED_ROWS), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _dropped_mass_kernel[(batch * heads, parts)](
            q, k, key_bias, state, now, found, *q.stride(), *k.stride(),
            0 if key_bias is None or key_bias.shape[0] == 1 else k_len,
            state.shape[0], heads, heads // k.shape[1], q_len, k_len, tile_count(q_len, tile.q), state.shape[-1],
            row_layout(tile_count(k_len, tile.k)).mask_start, keys_per_part, scale * LOG2_E,
            HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), TILE_Q=tile.q, TILE_K=tile.k,
            HAS_BIAS=key_bias is not None, **LAUNCH,
        )  # fmt: skip
    maxima, totals, dropped = found.unbind(2)
    # A part whose keys are all hidden has a maximum of -inf and weighs nothing.
    highest = maxima.amax(1, keepdim=True)
    weight = torch.where(maxima == -torch.inf, 0.0, torch.exp2(maxima - highest))
    total = (totals * weight).sum(1)
    mass = torch.where(total > 0, (dropped * weight).sum(1) / total, 0.0)
    return torch.stack([mass.mean(), mass.amax()])
