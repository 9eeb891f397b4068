"""Attention on NVIDIA GPUs that skips the key tiles its state marks: one Triton program per tile of queries.

`ops.attend_reference` is the specification. The skip bits of a program are expanded into a list of tile indices before
its main loop: a test per tile inside the loop would keep Triton from pipelining the loads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import LOG2_E
from ..skip_state import TileShape, row_layout, tile_count
from .launch import Launch, Launcher, address_of, kinds
from .tma_blocks import addressable, triton_descriptor
from .visit_lists import COMPUTED, EPOCH, HEADER, SIZES, find_row, is_free, range_arguments, write_marks, write_order

_LN_2, _LOG2_E = tl.constexpr(math.log(2)), tl.constexpr(LOG2_E)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min / LOG2_E)
"""Natural units: below it, float32 has no finite value in log2 units."""


@triton.jit
def load_threshold(threshold):
    """What `threshold` points to; NaN, below which nothing lies, if it is positive."""
    value = tl.load(threshold)
    return tl.where(value <= 0, value, float("nan"))


@triton.jit
def _load_rows(pointers, row_inside, dim_inside, ALL_ROWS: tl.constexpr, ALL_DIMS: tl.constexpr):
    """Tile `[rows, BLOCK_D]`, zeros outside; no mask where a constexpr says that none is needed."""
    if ALL_ROWS and ALL_DIMS:
        return tl.load(pointers)
    elif ALL_ROWS:
        return tl.load(pointers, mask=dim_inside[None, :], other=0.0)
    elif ALL_DIMS:
        return tl.load(pointers, mask=row_inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=row_inside[:, None] & dim_inside[None, :], other=0.0)


@triton.jit
def _load_block(descriptor, batch, head, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile `[ROWS, COLUMNS]` from row `start` on, zeros outside."""
    return descriptor.load([batch.to(tl.int32), head.to(tl.int32), start, 0]).reshape(ROWS, COLUMNS)


@triton.jit
def _load_bias(pointers, inside, ALL_ROWS: tl.constexpr):
    """Bias of a tile's keys in log2 units, -inf past the last of them. What would overflow stays as it is, since the
    dense sum is finite there."""
    bias = tl.load(pointers) if ALL_ROWS else tl.load(pointers, mask=inside, other=float("-inf"))
    return tl.where(bias > _LOWEST, bias * _LOG2_E, bias)


@triton.jit
def _record_visits(needed, row_live, total, order, marks, start, count):
    """Write the marks of the visits `start ... start + 31`; bit n of `needed`: visit start + n matters to this row."""
    # A row that has met a NaN needs every tile.
    needed = tl.where(total == total, needed, -1)
    word = tl.reduce_or(tl.where(row_live, needed, 0), 0)
    bit = tl.arange(0, 32)
    visit = start + bit
    tile = tl.load(order + visit, mask=visit < count, other=0)
    marked = ((word >> bit) & 1) == 0
    tl.store(marks + tile, marked.to(marks.dtype.element_ty), mask=visit < count)


@triton.jit
def _write_row(
    row, marks, markable, protected, key_tiles, epoch, count, argmax_tile, row_live, k_tiles, anchor_words,
    anchor_group, TILE_K: tl.constexpr, HAS_KINDS: tl.constexpr,
):  # fmt: skip
    """Write this program's row of the state. `markable`: `k_tiles`, or 0 if the row may skip none."""
    tl.store(row + EPOCH, epoch)
    tl.store(row + COMPUTED, count)
    group = argmax_tile // anchor_group
    for i in range(anchor_words):
        bits = tl.where(row_live & (group // 32 == i), 1 << (group % 32), 0)
        tl.store(row + HEADER + i, tl.reduce_or(bits, 0))
    write_marks(row, marks, markable, protected, key_tiles, k_tiles, anchor_words, TILE_K, HAS_KINDS)


class LaunchConfig(NamedTuple):
    """How the kernel is compiled for one class of devices, dtypes and head dims."""

    tile: TileShape
    warps: int
    stages: int
    by_tma: bool = False
    """Whether q, k and v are TMA descriptors instead of pointers."""


def _config(tile_q: int, tile_k: int, warps: int, stages: int, by_tma: bool = False) -> LaunchConfig:
    return LaunchConfig(TileShape(tile_q, tile_k), warps, stages, by_tma)


_SMALL_SHARED_MEMORY = {
    (16, 64): _config(128, 64, 8, 3), (16, 128): _config(128, 64, 8, 2), (16, 256): _config(64, 32, 8, 2),
    (32, 64): _config(64, 32, 8, 2), (32, 128): _config(32, 32, 8, 2), (32, 256): _config(16, 16, 8, 2),
}  # fmt: skip
CONFIGS: dict[tuple[int, int], dict[tuple[int, int], LaunchConfig]] = {
    (8, 0): {
        (16, 64): _config(128, 64, 4, 3), (16, 128): _config(128, 64, 8, 3), (16, 256): _config(64, 64, 8, 2),
        (32, 64): _config(64, 32, 8, 2), (32, 128): _config(32, 32, 8, 2), (32, 256): _config(32, 16, 8, 2),
    },
    (8, 6): _SMALL_SHARED_MEMORY,
    # For what `TMA_CONFIGS` leaves. In 16 bits the fastest of ten on an H100 that spill nothing.
    (9, 0): {
        (16, 64): _config(64, 64, 4, 3), (16, 128): _config(128, 64, 8, 3), (16, 256): _config(128, 64, 8, 2),
        (32, 64): _config(64, 32, 4, 2), (32, 128): _config(64, 32, 8, 2), (32, 256): _config(32, 16, 8, 2),
    },
    (10, 0): {
        (16, 64): _config(128, 64, 8, 3), (16, 128): _config(128, 64, 8, 3), (16, 256): _config(128, 32, 8, 2),
        (32, 64): _config(64, 32, 8, 2), (32, 128): _config(64, 32, 8, 2), (32, 256): _config(32, 16, 8, 2),
    },
    (12, 0): _SMALL_SHARED_MEMORY,
}  # fmt: skip
"""By lowest compute capability of the class, then by (bits of the dtype, largest head dim). Fixed, not tuned at run
time: the kernel mutates its state, and the tile size is the granularity of the masks. But for 9.0 no card was at hand:
chosen by registers, spills, shared memory and occupancy of offline compilations (benchmarks/kernel_resources.py)."""

TMA_CONFIGS = {(16, 64): _config(64, 128, 4, 3, by_tma=True), (16, 128): _config(128, 128, 8, 3, by_tma=True)}
"""In place of `CONFIGS` on compute capability 9.x, for head dims that are multiples of 8, which TMA can step over. The
fastest of those measured on an H200 in bfloat16; with loads by pointers, these tiles spill registers."""


@triton.jit(do_not_specialize=["heads", "heads_per_kv", *SIZES], do_not_specialize_on_alignment=["threshold"])
def _attend_kernel(
    q, k, v, key_bias, key_tiles, out, lse, state, now, scratch,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s, out_stride_b, out_stride_h, out_stride_s, bias_stride_b,
    streams, heads, heads_per_kv, q_len, k_len, q_tiles, k_tiles, row_words, anchor_words, anchor_group,
    start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3,
    qk_scale, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, BY_MASS: tl.constexpr,
    HAS_KINDS: tl.constexpr, BY_TMA: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; arguments as `attend_triton` documents them.

    Args:
        q, k, v: if BY_TMA, descriptors of blocks `[1, 1, TILE_Q or TILE_K, BLOCK_D]`, and their strides are not used.
        scratch: int16 or int32 `[programs, 2, k_tiles]`: the visit list, and one mark per tile.
        qk_scale: softmax scale * log2 e, positive, so that a row's maximum can be taken before scaling.
        start_0 ...: protected ranges; those that are not needed are empty.
    """
    ALL_DIMS: tl.constexpr = HEAD_DIM == BLOCK_D
    protected = (start_0, end_0, start_1, end_1, start_2, end_2, start_3, end_3)
    program = tl.program_id(0)
    q_tile = program % q_tiles
    batch = (program // q_tiles // heads).to(tl.int64)
    head = (program // q_tiles % heads).to(tl.int64)

    limit = load_threshold(threshold)
    if BY_MASS:
        limit = tl.exp2(limit) / k_tiles
    row, epoch, recording, valid = find_row(state, now, program, streams, row_words)
    markable = tl.where(is_free(q_tile, TILE_Q, protected), k_tiles, 0)
    recorded = tl.where(valid, markable, 0)
    order = scratch + program.to(tl.int64) * 2 * k_tiles
    marks = order + k_tiles
    first = ((q_tile.to(tl.int64) * TILE_Q * k_len // q_len) // TILE_K).to(tl.int32)
    count = write_order(
        row, recorded, protected, key_tiles, order, marks, first, k_tiles, anchor_words, anchor_group, TILE_K, HAS_KINDS
    )
    tl.debug_barrier()

    q_row = tl.arange(0, TILE_Q)
    k_row = tl.arange(0, TILE_K)
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < HEAD_DIM
    q_start = q_tile.to(tl.int64) * TILE_Q
    row_live = q_row < q_len - q_tile * TILE_Q
    kv_head = head // heads_per_kv
    if BY_TMA:
        q_block = _load_block(q, batch, head, q_tile * TILE_Q, TILE_Q, BLOCK_D)
    else:
        q += batch * q_stride_b + head * q_stride_h + q_start * q_stride_s
        k += batch * k_stride_b + kv_head * k_stride_h
        v += batch * v_stride_b + kv_head * v_stride_h
        k_offsets = k_row[:, None] * k_stride_s + dim[None, :]
        v_offsets = k_row[:, None] * v_stride_s + dim[None, :]
        q_block = _load_rows(q + q_row[:, None] * q_stride_s + dim[None, :], row_live, dim_inside, False, ALL_DIMS)

    running = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    weighted = tl.zeros([TILE_Q, BLOCK_D], tl.float32)
    argmax_tile = tl.zeros([TILE_Q], tl.int32)
    needed = tl.zeros([TILE_Q], tl.int32)
    one = tl.full([], 1, tl.int32)
    for n in range(count):
        tile = tl.load(order + n).to(tl.int32)
        k_start = tile.to(tl.int64) * TILE_K
        left = k_len - tile * TILE_K
        if BY_TMA:
            k_block = _load_block(k, batch, kv_head, tile * TILE_K, TILE_K, BLOCK_D)
        else:
            k_block = _load_rows(k + k_start * k_stride_s + k_offsets, k_row < left, dim_inside, EVEN_K, ALL_DIMS)
        scores = tl.dot(q_block, tl.trans(k_block), input_precision="tf32x3")
        if not (EVEN_K or HAS_BIAS):  # noqa: SIM102, decided when compiling
            if left < TILE_K:
                scores = tl.where((k_row < left)[None, :], scores, float("-inf"))
        if HAS_BIAS:
            bias = _load_bias(key_bias + batch * bias_stride_b + k_start + k_row, k_row < left, EVEN_K)
            scores = scores * qk_scale + bias[None, :]
            factor = 1.0
        else:
            factor = qk_scale
        tile_max = tl.max(scores, 1) * factor
        # The difference is NaN while a row has met nothing but -inf.
        if BY_MASS:
            hidden = tl.where(tile_max - running == float("-inf"), 1.0, 0.0)
        else:
            needed |= tl.where(tile_max - running <= limit, 0, one << (n % 32))
        argmax_tile = tl.where(tile_max > running, tile, argmax_tile)
        raised = tl.maximum(running, tile_max)
        # A row that has met nothing but -inf has no maximum to subtract.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores * factor - shift[:, None])
        decay = tl.exp2(running - shift)
        running = raised
        if BY_MASS:
            mass = tl.sum(weights, 1)
            total = total * decay + mass
            needed |= tl.where(mass < limit * total + hidden, 0, one << (n % 32))
        else:
            total = total * decay + tl.sum(weights, 1)
        if BY_TMA:
            v_block = _load_block(v, batch, kv_head, tile * TILE_K, TILE_K, BLOCK_D)
        else:
            v_block = _load_rows(v + k_start * v_stride_s + v_offsets, k_row < left, dim_inside, EVEN_K, ALL_DIMS)
        weighted = tl.dot(weights.to(v_block.dtype), v_block, weighted * decay[:, None], input_precision="tf32x3")
        # The vote of all rows synchronises the warps: take it once per 32 tiles.
        if n % 32 == 31:
            _record_visits(needed, row_live, total, order, marks, n - 31, count)
            needed = tl.zeros([TILE_Q], tl.int32)

    weighted *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    out += batch * out_stride_b + head * out_stride_h + q_start * out_stride_s
    inside = row_live[:, None] if ALL_DIMS else row_live[:, None] & dim_inside[None, :]
    tl.store(out + q_row[:, None] * out_stride_s + dim[None, :], weighted.to(out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        lse += (program // q_tiles).to(tl.int64) * q_len + q_start
        tl.store(lse + q_row, (running + tl.log2(total)) * _LN_2, mask=row_live)
    if recording:
        _record_visits(needed, row_live, total, order, marks, count // 32 * 32, count)
        tl.debug_barrier()
        _write_row(
            row, marks, markable, protected, key_tiles, epoch, count, argmax_tile, row_live, k_tiles, anchor_words,
            anchor_group, TILE_K, HAS_KINDS,
        )  # fmt: skip


@functools.cache
def _launch_config(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> LaunchConfig:
    """Entry of the tables above for a device; a capability unknown to `CONFIGS` takes the nearest lower class."""
    known = [lowest for lowest in CONFIGS if lowest <= capability]
    if not known:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed")
    if not 1 <= head_dim <= 256:
        raise ValueError(f"head dim {head_dim}; at most 256 is supported")
    widest = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    size = (8 * dtype.itemsize, widest)
    if capability[0] == 9 and head_dim % 8 == 0 and size in TMA_CONFIGS:
        return TMA_CONFIGS[size]
    return CONFIGS[max(known)][size]


@functools.cache
def _device_config(device: int, dtype: torch.dtype, head_dim: int) -> LaunchConfig:
    """`device`: index of the GPU; -1 under Triton's interpreter, which runs on CPU tensors."""
    return _launch_config(torch.cuda.get_device_capability(device) if device >= 0 else (8, 0), dtype, head_dim)


def triton_tile(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> TileShape:
    """Tile size on a device of this compute capability (8.0 or newer) for float16, bfloat16 or float32."""
    return _launch_config(capability, dtype, head_dim).tile


_attend = Launcher(_attend_kernel)


@dataclass(frozen=True)
class _Plan:
    """What follows from shapes, strides, dtypes and options alone."""

    programs: int
    device: int
    index: torch.dtype
    scratch_shape: tuple[int, ...]
    strides: tuple[int, ...]
    """`_attend_kernel`'s, all of them."""
    sizes: tuple[int, ...]
    """`_attend_kernel`'s, from `streams` to `end_3`."""
    constants: dict[str, Any]
    options: dict[str, Any]
    name: tuple[Hashable, ...]
    """Of the compiled variant, but for alignment."""
    _launches: dict[tuple[bool, ...], Launch] = field(default_factory=dict)

    def launch(self, aligned: tuple[bool, ...]) -> Launch:
        """The launch for pointers of which these are multiples of 16."""
        if aligned not in self._launches:
            self._launches[aligned] = _attend.variant(
                self.device, (*self.name, aligned), self.constants, **self.options
            )
        return self._launches[aligned]


@functools.lru_cache(256)
def _plan(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], q_strides: tuple[int, ...], k_strides: tuple[int, ...],
    v_strides: tuple[int, ...], out_strides: tuple[int, ...], dtype: torch.dtype, device: int, tile: TileShape,
    streams: int, bias_rows: int | None, has_lse: bool, protected: tuple[int, ...],
    criterion: str, has_kinds: bool, config: LaunchConfig,
) -> _Plan:  # fmt: skip
    batch, heads, q_len, head_dim = q_shape
    kv_heads, k_len = k_shape[1:3]
    q_tiles, k_tiles = tile_count(q_len, tile.q), tile_count(k_len, tile.k)
    programs, layout = batch * heads * q_tiles, row_layout(k_tiles)
    index = torch.int16 if k_tiles < 2**15 else torch.int32
    if config.by_tma:
        q_strides = k_strides = v_strides = (0, 0, 0)
    strides = (
        *q_strides[:3], *k_strides[:3], *v_strides[:3], *out_strides[:3], 0 if bias_rows in (None, 1) else k_len
    )  # fmt: skip
    sizes = (
        streams, heads, heads // kv_heads, q_len, k_len, q_tiles, k_tiles,
        layout.words, layout.anchor_words, layout.anchor_group, *range_arguments(protected),
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "TILE_Q": tile.q, "TILE_K": tile.k,
        "EVEN_K": k_len % tile.k == 0, "HAS_BIAS": bias_rows is not None, "HAS_LSE": has_lse,
        "BY_MASS": criterion == "mass", "HAS_KINDS": has_kinds, "BY_TMA": config.by_tma,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    return _Plan(
        programs, device, index, (programs, 2, k_tiles), strides, sizes, constants, options,
        (dtype, index, kinds(strides)),
    )  # fmt: skip


def attend_triton(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor,
    tile: TileShape, out: Tensor, lse: Tensor | None = None, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), criterion: str = "max", key_tiles: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of `q` over the key tiles that `state` does not skip, into `out`; marks tiles for the next call.

    Args:
        q: `[B, H, Sq, D]`; k, v: `[B, Hkv, Sk, D]`: float32, bfloat16 or float16, D <= 256; any strides, but a last
            stride other than 1 costs a copy, and what is not `is_addressable` where TMA loads. `Hkv` divides `H`.
        state: contiguous int32 `[streams, B, H, q_tiles, row_words]` as `skip_state` lays it out; updated in place.
        now: int32, first of all epoch, step, slot (none of the state's: compute everything, use and record nothing).
        scale: softmax scale.
        threshold: float32, one element, log2 units, <= 0; `-inf` marks nothing but tiles whose scores are all -inf.
        tile: tile size the state was made for, from `triton_tile`.
        out: `[B, H, Sq, D]`, dtype of `q`, last stride 1; overwritten.
        lse: natural-log sum of exponentials, contiguous float32 `[B, H, Sq]`; overwritten when given.
        key_bias: float32 `[B, Sk]` or `[1, Sk]`, added to the scaled scores.
        protected: `start, end` of ranges of positions whose tiles are always computed, as in `ops.attend_reference`.
        criterion: "max" or "mass", as there.
        key_tiles: contiguous int8 `[k_tiles]`, the kind of each key tile, as there.
    """
    if scale <= 0:
        q, scale = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    config = _device_config(q.get_device(), q.dtype, q.shape[3])
    if config.by_tma:
        q, k, v = map(addressable, (q, k, v))
    else:
        # Offsets within a tile are computed in 32 bits.
        q, k, v = (x if x.stride(3) == 1 and max(tile) * x.stride(2) < 2**31 else x.contiguous() for x in (q, k, v))
    key_bias = None if key_bias is None else key_bias.contiguous()
    plan = _plan(
        q.shape, k.shape, q.stride(), k.stride(), v.stride(), out.stride(), q.dtype, q.get_device(), tile,
        state.shape[0], None if key_bias is None else key_bias.shape[0], lse is not None, tuple(protected),
        criterion, key_tiles is not None, config,
    )  # fmt: skip
    scratch = state.new_empty(plan.scratch_shape, dtype=plan.index)
    tensors = (key_bias, key_tiles, out, lse, state, now, scratch)
    blocks: tuple[Any, ...] = (q, k, v)
    addresses, block_addresses = tuple(map(address_of, tensors)), tuple(map(address_of, blocks))
    aligned = tuple([address is None or address % 16 == 0 for address in (*block_addresses, *addresses)])
    if config.by_tma:
        columns = plan.constants["BLOCK_D"]
        blocks = block_addresses = tuple(
            [triton_descriptor(x, rows, columns) for x, rows in ((q, tile.q), (k, tile.k), (v, tile.k))]
        )
    launch = plan.launch(aligned)
    arguments: tuple[Any, ...] = (*blocks, *tensors)
    limit: Tensor | int = threshold
    if launch.ready:
        arguments, limit = (*block_addresses, *addresses), threshold.data_ptr()
    with torch.cuda.device_of(q):
        launch((plan.programs, 1, 1), (*arguments, *plan.strides, *plan.sizes, scale * LOG2_E, limit))
