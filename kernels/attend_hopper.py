"""Attention on Hopper GPUs that skips the key tiles its state marks: what is launched for one call.

`ops.attend_reference` is the specification. Where rows have up to 64 key tiles a call is one launch, of the workers of
`hopper_short_rows`. Else it is four: `list_visits` expands the skip bits into a list of tiles per program,
`queue_programs` says which programs come first, the workers of `hopper_workers` compute attention over the lists and
note which tiles mattered, and `record_visits` packs the notes into bits. A bias (`flag_biased`) and products in 8 bits
(`quantize`) take launches of their own before that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from ..ops import LOG2_E
from ..skip_state import TileShape, row_layout, tile_count
from .hopper_pipeline import CONSUMER_ROWS, HOPPER_TILE
from .hopper_short_rows import MAX_TILES, attend_short_kernel
from .hopper_workers import attend_kernel
from .launch import Launch, Launcher, address_of, multiprocessors
from .quantize_qk import quantize
from .scratch import Scratch
from .tma_blocks import addressable, is_addressable, tma_descriptor
from .visit_lists import flag_biased, list_visits, queue_programs, range_arguments, record_visits
from .work_counters import WorkCounters

_list_visits, _queue_programs, _flag_biased, _attend, _attend_short, _record_visits = map(
    Launcher, (list_visits, queue_programs, flag_biased, attend_kernel, attend_short_kernel, record_visits)
)
_counters = functools.cache(WorkCounters)


class _Lists(NamedTuple):
    """What surrounds the kernel that works through lists."""

    list_visits: Launch
    queue_programs: Launch
    record_visits: Launch


class _Plan(NamedTuple):
    """What follows from shapes, dtypes and options alone."""

    programs: int
    q_tiles: int
    k_tiles: int
    scratch: Scratch
    """`order`, `counts`, `notes`, `queue`, `biased`."""
    sizes: tuple[int, ...]
    """`visit_lists.SIZES`."""
    lengths: tuple[int, ...]
    """`attend_kernel`'s, from `programs` to `bias_stride`."""
    flag_biased: Launch
    attend: Launch
    lists: _Lists | None
    """None: rows are short, and `attend` reads and writes their bits itself."""

    @property
    def ready(self) -> bool:
        """Whether all is compiled, so that addresses do. Variants are shared between plans, each with other ones.

        Where `attend` is ready, so are `queue_programs` and `flag_biased`, if it needs them: each has one variant.
        """
        lists = self.lists
        return self.attend.ready and (lists is None or (lists.list_visits.ready and lists.record_visits.ready))


def _fixes_shift(dtype: torch.dtype, head_dim: int, has_bias: bool) -> bool:
    """Whether long rows use `hopper_fixed_shift`.

    float16 has too few exponents for it, a bias may hide a row's first tile, and at head dims up to 64 it is slower.
    """
    return dtype == torch.bfloat16 and head_dim > 64 and not has_bias


@functools.lru_cache(256)
def _plan(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: torch.dtype, device: int, streams: int,
    bias_rows: int | None, has_lse: bool, protected: tuple[int, ...], qk_dtype: str | None,
    criterion: str, has_kinds: bool,
) -> _Plan:  # fmt: skip
    batch, heads, q_len, head_dim = q_shape
    kv_heads, k_len = k_shape[1:3]
    q_tiles, k_tiles = tile_count(q_len, HOPPER_TILE.q), tile_count(k_len, HOPPER_TILE.k)
    programs, layout = batch * heads * q_tiles, row_layout(k_tiles)
    short = k_tiles <= MAX_TILES
    index = torch.int16 if k_tiles < 2**15 else torch.int32
    scratch = Scratch.of(
        ((programs, k_tiles), index), ((0 if short else programs + 1,), torch.int32),
        ((programs, 1 + 2 * k_tiles), torch.int8), ((0 if short else programs,), torch.int64),
        ((bias_rows or 0, k_tiles), torch.int8),
    )  # fmt: skip
    sizes = (
        streams, q_len, k_len, q_tiles, k_tiles, layout.words, layout.anchor_words, layout.anchor_group,
        *range_arguments(protected),
    )  # fmt: skip
    bias_stride = 0 if bias_rows in (None, 1) else k_len
    lengths = (programs, heads, heads // kv_heads, q_len, k_len, q_tiles, k_tiles, bias_stride)
    tiles: dict[str, Any] = {"TILE_Q": HOPPER_TILE.q, "TILE_K": HOPPER_TILE.k, "HAS_KINDS": has_kinds}
    constants = {
        "EVEN_K": k_len % HOPPER_TILE.k == 0, "HAS_LSE": has_lse, "HAS_BIAS": bias_rows is not None,
        "QK_BITS": 8 * dtype.itemsize if qk_dtype is None else 8, "BY_MASS": criterion == "mass",
        "FIXED_SHIFT": _fixes_shift(dtype, head_dim, bias_rows is not None),
    }  # fmt: skip
    name = dtype, head_dim <= 64, index, qk_dtype
    if short:
        del constants["EVEN_K"], constants["FIXED_SHIFT"]
        constants |= {"HAS_KINDS": has_kinds, "HAS_RANGES": len(protected) > 0}
    return _Plan(
        programs, q_tiles, k_tiles, scratch, sizes, lengths,
        _flag_biased.variant(device, None, {"TILE_K": HOPPER_TILE.k}, num_warps=1),
        (_attend_short if short else _attend).variant(device, name, constants, num_warps=4),
        None if short else _Lists(
            _list_visits.variant(device, index, tiles, num_warps=1),
            _queue_programs.variant(device, None, {}, num_warps=8),
            _record_visits.variant(device, None, tiles, num_warps=1),
        ),
    )  # fmt: skip


def attend_hopper(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, now: Tensor, scale: float, threshold: Tensor,
    tile: TileShape, out: Tensor, lse: Tensor | None = None, key_bias: Tensor | None = None,
    protected: Sequence[int] = (), qk_dtype: str | None = None, criterion: str = "max", key_tiles: Tensor | None = None,
) -> None:  # fmt: skip
    """Attention of `q` over the key tiles that `state` does not skip, into `out`; marks tiles for the next call.

    Args:
        q: `[B, H, Sq, D]`; k, v: `[B, Hkv, Sk, D]`: bfloat16 or float16, D <= 128 and a multiple of 8, Hkv divides H.
            Any strides; what is not `is_addressable` costs a copy.
        tile: `HOPPER_TILE`.
        out: `[B, H, Sq, D]`, dtype of `q`, `is_addressable`; overwritten.
        state, now, scale, threshold, lse, key_bias, protected, criterion, key_tiles: as in `attend_triton`.
        qk_dtype: name in `QK_DTYPES` of what q and k are rounded to for their product; None: nothing. The LSE is then
            that of the scores less the row's product with the mean key.
    """
    if tile != HOPPER_TILE:
        raise ValueError(f"tile is {tuple(tile)}; allowed: {tuple(HOPPER_TILE)}")
    if not is_addressable(out):
        raise ValueError(f"out has strides {out.stride()}, address {out.data_ptr():#x}; allowed: what TMA can write to")
    if scale <= 0:
        q, scale = (q.neg(), -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    bias_rows = None if key_bias is None else key_bias.shape[0]
    plan = _plan(
        q.shape, k.shape, q.dtype, q.get_device(), state.shape[0], bias_rows, lse is not None, tuple(protected),
        qk_dtype, criterion, key_tiles is not None,
    )  # fmt: skip
    buffer = plan.scratch.allocate(q.device)
    order, counts, notes, queue, biased = (plan.scratch.addresses if plan.ready else plan.scratch.tensors)(buffer)
    given: tuple[Any, ...] = (state, now, key_tiles, lse, threshold)
    state_at, now_at, kinds_at, lse_at, limit_at = map(address_of, given) if plan.ready else given
    q_scales = k_scales = None
    with torch.cuda.device_of(q):
        if qk_dtype is not None:
            columns = 64 if q.shape[3] <= 64 else 128
            q, q_scales = quantize(_in_rows(q), qk_dtype, CONSUMER_ROWS, columns, center=False)
            k, k_scales = quantize(_in_rows(k), qk_dtype, tile.k, columns, center=True)
        if key_bias is not None:
            key_bias = key_bias.contiguous()
            plan.flag_biased((plan.k_tiles, key_bias.shape[0], 1), (key_bias, biased, k.shape[2]))
        q, k, v = map(addressable, (q, k, v))
        blocks = [
            tma_descriptor(x, rows) for x, rows in ((q, CONSUMER_ROWS), (k, tile.k), (v, tile.k), (out, CONSUMER_ROWS))
        ]
        workers = min(plan.programs, multiprocessors(q.get_device())), 1, 1
        inputs = *blocks, lse_at, key_bias, None if key_bias is None else biased, q_scales, k_scales
        if plan.lists is None:
            stream = driver.active.get_current_stream(q.get_device())
            counter = _counters(q.device).of(state.data_ptr(), stream)
            counter_at = address_of(counter) if plan.ready else counter
            plan.attend(workers, (
                *inputs, state_at, now_at, kinds_at, order, notes, counter_at, *plan.lengths, state.shape[0],
                *range_arguments(protected), scale * LOG2_E, limit_at,
            ))  # fmt: skip
        else:
            plan.lists.list_visits(
                (plan.programs, 1, 1), (state_at, now_at, kinds_at, order, counts, notes, *plan.sizes)
            )
            plan.lists.queue_programs((plan.programs // plan.q_tiles, 1, 1), (counts, queue, plan.q_tiles))
            plan.attend(workers, (*inputs, order, notes, counts, queue, *plan.lengths, scale * LOG2_E, limit_at))
            plan.lists.record_visits((plan.programs, 1, 1), (state_at, now_at, kinds_at, counts, notes, *plan.sizes))


def _in_rows(x: Tensor) -> Tensor:
    """`x`, or a copy, whose rows are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
