"""The kernels on a real GPU, against float64 and against the reference's skip states."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from gpu_kernels import KERNELS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite_compile.dropped_mass import dropped_mass
from lite_compile.kernels.select_kernel import HOPPER, Kernel, hopper_obstacle, select_kernel
from lite_compile.key_ranges import KeyRanges, find_key_tiles, hide_keys, range_table
from lite_compile.ops import COMPUTED_TILE, CRITERIA, HIDDEN_TILE, attend_reference, touched_tiles
from lite_compile.skip_state import TileShape, row_layout, state_shape, tile_count, unpack_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [  # batch, heads, q_len, k_len, head_dim
    (1, 2, 512, 512, 64),
    (2, 3, 1000, 1000, 128),
    (1, 2, 333, 777, 96),
    (1, 1, 1, 130, 64),
    (2, 2, 257, 65, 40),
    (1, 4, 300, 500, 36),
    (1, 2, 640, 640, 16),
    (1, 2, 500, 500, 72),
    (1, 2, 500, 500, 80),
    (1, 2, 300, 900, 120),
    (1, 2, 384, 384, 192),
    (1, 2, 515, 515, 256),
    (1, 2, 200, 8400, 128),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def serves(kernel: str, dtype: torch.dtype, dim: int) -> bool:
    return kernel == "triton" or hopper_obstacle(HOPPER, dtype, dim) is None


def make(
    shape: tuple[int, ...], dtype: torch.dtype, sharpness: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as diffusers lays them out; a high sharpness makes most tiles negligible."""
    batch, heads, q_len, k_len, dim = shape
    generator = torch.Generator(device="cuda").manual_seed(seed)
    tensors = []
    for length in (q_len, k_len, k_len):
        x = torch.randn(batch, length, heads, dim, device="cuda", generator=generator)
        position = torch.linspace(0, 6.0, length, device="cuda")[None, :, None, None]
        wave = torch.cat([torch.cos(position * f) for f in range(1, dim // 4 + 1)] * 4, -1)[..., :dim]
        wave = F.pad(wave, (0, dim - wave.shape[-1]))
        tensors.append((0.3 * x + wave).to(dtype).transpose(1, 2) if sharpness > 1 else x.to(dtype).transpose(1, 2))
    return tensors[0] * sharpness, tensors[1], tensors[2]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slot: int, threshold: float, scale: float, lse: bool = False,
    key_bias: Tensor | None = None, protected: Sequence[int] = (), kernel: str = "triton", criterion: str = "max",
    kinds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tile = chosen(kernel, q).tile
    now = torch.tensor([7, 0, slot, 1, 0], dtype=torch.int32, device="cuda")
    limit = torch.tensor(threshold, device="cuda")
    torch.empty_like(q).fill_(float("nan"))  # poison what the allocator may hand out as the output
    return torch.ops.lite_compile.attend(
        q, k, v, state, now, scale, limit, tile.q, tile.k, True, lse, key_bias, protected, kernel, criterion, kinds
    )


def chosen(kernel: str, q: Tensor) -> Kernel:
    found = select_kernel(q.device, q.dtype, q.shape[-1], kernel)
    assert isinstance(found, Kernel), found
    return found


def new_state(q: Tensor, k: Tensor, kernel: str = "triton") -> tuple[Tensor, TileShape]:
    tile = chosen(kernel, q).tile
    shape = state_shape(2, q.shape[0], q.shape[1], q.shape[2], k.shape[2], tile)
    return torch.zeros(shape, dtype=torch.int32, device="cuda"), tile


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(SHAPES, DTYPES)), ids=str)
@pytest.mark.parametrize("scale", [None, 0.5, -0.3])
def test_nothing_skipped_is_as_exact_as_dense_attention(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float | None, kernel: str
) -> None:
    if not serves(kernel, dtype, shape[-1]):
        assert isinstance(select_kernel(torch.device("cuda"), dtype, shape[-1], kernel), str)
        return
    q, k, v = make(shape, dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    expected, expected_lse = exact(q, k, v, scale)
    # Of torch's own kernels only the unfused one survives a negative scale (the others give NaN).
    with sdpa_kernel(SDPBackend.MATH) if scale < 0 else nullcontext():
        dense = (F.scaled_dot_product_attention(q, k, v, scale=scale).double() - expected).norm()
    state, tile = new_state(q, k, kernel)
    for slot in (-1, 1):
        out, lse = attend(q, k, v, state, slot, -float("inf"), scale, lse=True, kernel=kernel)
        assert (out.double() - expected).norm() <= 2 * dense + 1e-6 * expected.norm()
        assert (lse.double() - expected_lse).abs().max() < (1e-4 if dtype == torch.float32 else 2e-3)
    assert not state[..., row_layout(tile_count(k.shape[2], tile.k)).mask_start :].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("where", [0, 300, 700])
def test_a_maximum_that_rises_in_one_row_alone(dim: int, where: int, kernel: str) -> None:
    """Accumulators are rescaled where a maximum rises, which kernels decide for several rows together."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (0.1 * torch.randn(1, 1, 768, dim, device="cuda", generator=generator) for _ in range(3))
    k[..., where : where + 8, 0] = 40.0
    for row in (*range(0, 64, 7), 200, 767):
        alone = q.clone()
        alone[..., 0] = -4.0
        alone[:, :, row, 0] = 4.0
        rounded = [x.to(torch.bfloat16) for x in (alone, k, v + 1)]
        expected, _ = exact(*rounded, 0.1)
        state, _ = new_state(*rounded[:2], kernel)
        out, _ = attend(*rounded, state, 0, -float("inf"), 0.1, kernel=kernel)
        assert (out.double() - expected).abs().max() < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2, 1024, 1024, 64), (2, 2, 1100, 900, 128), (1, 1, 700, 1500, 80), (1, 1, 1500, 8400, 128)], ids=str
)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_states_follow_the_reference(shape: tuple[int, ...], dtype: torch.dtype, kernel: str, criterion: str) -> None:
    """Word for word, but for tiles within rounding of the threshold, which are counted."""
    q, k, v = make(shape, dtype, sharpness=4.0)
    scale, threshold = q.shape[-1] ** -0.5, -8.0
    state, tile = new_state(q, k, kernel)
    expected = state.cpu()
    now = torch.tensor([7, 0, 1, 1, 0], dtype=torch.int32)
    doubles = [x.double().cpu() for x in (q, k, v)]
    k_tiles = tile_count(k.shape[2], tile.k)
    start = row_layout(k_tiles).mask_start
    for _ in range(3):
        out, _ = attend(q, k, v, state, 1, threshold, scale, kernel=kernel, criterion=criterion)
        reference, _ = attend_reference(
            *doubles, expected, now, scale, torch.tensor(threshold), tile, criterion=criterion
        )
        assert (out.cpu().double() - reference).norm() < 2e-2 * reference.norm()
        ours, theirs = (unpack_bits(s[1, ..., start:].cpu(), k_tiles) for s in (state, expected))
        assert (ours != theirs).sum() <= 0.01 * ours.numel()
        expected.copy_(state.cpu())  # go on from one state, so that differences do not add up
    assert ours.float().mean() > 0.2
    assert not state[0].any()


def padding(kind: str, batch: int, k_len: int) -> Tensor:
    """float32 `[batch, k_len]`: the last third of the last batch entry is padding."""
    bias = torch.zeros(batch, k_len, device="cuda")
    bias[:, 3:9] = -1.5
    values = {"infinite": -torch.inf, "lowest": torch.finfo(torch.float32).min, "finite": -1e4}
    bias[-1, 2 * k_len // 3 :] = values[kind]
    return bias


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["infinite", "lowest", "finite"])
@pytest.mark.parametrize("shape", [(2, 4, 512, 512, 64), (2, 4, 515, 1001, 128), (1, 4, 300, 300, 256)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_key_bias_and_shared_heads_are_as_exact_as_dense_attention(
    shape: tuple[int, ...], kv_heads: int, kind: str, dtype: torch.dtype, kernel: str
) -> None:
    if not serves(kernel, dtype, shape[-1]):
        return
    q, k, v = make(shape, dtype)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    bias, scale = padding(kind, shape[0], shape[3]), shape[4] ** -0.5
    mask = bias[:, None, None]
    repeated = [x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)]
    scores = q.double() @ repeated[0].double().mT * scale + mask.double()
    expected = scores.softmax(-1) @ repeated[1].double()
    with sdpa_kernel(SDPBackend.MATH):
        low = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask.to(dtype), scale=scale)
    dense = (low.double() - expected).norm()
    state, _ = new_state(q, k, kernel)
    out, lse = attend(q, k, v, state, 1, -1000.0, scale, lse=True, key_bias=bias, kernel=kernel)
    assert (out.double() - expected).norm() <= 2 * dense + 1e-6 * expected.norm()
    assert (lse.double() - scores.logsumexp(-1)).abs().max() < (1e-4 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["infinite", "lowest", "finite", "none"])
@pytest.mark.parametrize("shape", [(2, 2, 1024, 1024, 64), (2, 2, 1100, 1100, 128)], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_states_with_bias_shared_heads_and_protection_follow_the_reference(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, kernel: str, criterion: str
) -> None:
    q, k, v = make(shape, dtype, sharpness=4.0)
    k, v = k[:, :1], v[:, :1]
    scale, threshold, protected = shape[4] ** -0.5, -8.0, (0, 77, 600, 601)
    bias = None if kind == "none" else padding(kind, 2, shape[3])
    state, tile = new_state(q, k, kernel)
    expected = state.cpu()
    now = torch.tensor([7, 0, 1, 1, 0], dtype=torch.int32)
    doubles = [x.double().cpu() for x in (q, k, v)]
    k_tiles = tile_count(shape[3], tile.k)
    start = row_layout(k_tiles).mask_start
    for _ in range(3):
        given = {"key_bias": bias, "protected": protected, "kernel": kernel, "criterion": criterion}
        out, _ = attend(q, k, v, state, 1, threshold, scale, **given)  # type: ignore[arg-type]
        reference, _ = attend_reference(
            *doubles,
            expected,
            now,
            scale,
            torch.tensor(threshold),
            tile,
            None if bias is None else bias.cpu(),
            protected,
            criterion,
        )
        assert (out.cpu().double() - reference).norm() < 2e-2 * reference.norm()
        ours, theirs = (unpack_bits(s[1, ..., start:].cpu(), k_tiles) for s in (state, expected))
        assert (ours != theirs).sum() <= 0.01 * ours.numel()
        expected.copy_(state.cpu())  # go on from one state, so that differences do not add up
    assert ours.float().mean() > 0.1  # protected ranges leave less to mark, larger tiles as well
    assert not ours[:, :, touched_tiles(ours.shape[2], tile.q, protected)].any()
    assert not ours[..., touched_tiles(k_tiles, tile.k, protected)].any()


def misaligned(x: Tensor) -> Tensor:
    """The same one element past a multiple of 16 bytes."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def in_odd_rows(x: Tensor) -> Tensor:
    """The same in rows that are one element longer than they hold."""
    return F.pad(x, (0, 1))[..., :-1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dim", [36, 64, 72, 96, 128])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_where_inputs_lie_changes_nothing(dim: int, dtype: torch.dtype, kernel: str, criterion: str) -> None:
    """Views of `[B, S, H, D]`, contiguous tensors, and what TMA cannot address, which is copied: the same bits."""
    if not serves(kernel, dtype, dim):
        return
    q, k, v = make((2, 4, 1100, 900, dim), dtype, sharpness=4.0)
    k, v = k[:, :2], v[:, :2]
    scale, bias, results = dim**-0.5, padding("infinite", 2, 900), []
    places = [lambda x: x, Tensor.contiguous, misaligned, in_odd_rows, lambda x: x.mT.contiguous().mT]
    chances = [(place,) * 3 for place in places]
    chances += [(misaligned, places[0], places[0]), (places[0], in_odd_rows, places[0]), (*places[:2], misaligned)]
    for chosen_places in chances:
        tensors = [place(x) for place, x in zip(chosen_places, (q, k, v), strict=True)]
        state, tile = new_state(q, k, kernel)
        given = {"lse": True, "key_bias": bias, "protected": (0, 77, 600, 601), "criterion": criterion}
        for slot in (1, 1, 1, -1):
            out, lse = attend(*tensors, state, slot, -8.0, scale, kernel=kernel, **given)  # type: ignore[arg-type]
            results.append((out, lse, state.clone()))
    mask, repeated = bias[:, None, None].to(dtype), [x.repeat_interleave(2, 1) for x in (k, v)]
    dense = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=scale)
    for out, lse, _ in results[3::4]:
        assert (out - dense).norm() < 2e-2 * dense.norm()
        assert (lse - results[3][1]).abs().max() < 2e-3
    # Loads by pointers are compiled for how they are aligned, and may round differently.
    if kernel == "hopper" or (torch.cuda.get_device_capability()[0] == 9 and dim % 8 == 0):
        for n, result in enumerate(results):
            assert all(torch.equal(x, y) for x, y in zip(result, results[n % 4], strict=True))
    assert results[3][2][1, ..., row_layout(tile_count(900, tile.k)).mask_start :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_entry_without_keys_is_zero(dtype: torch.dtype) -> None:
    q, k, v = make((2, 2, 300, 300, 64), dtype)
    bias = torch.zeros(2, 300, device="cuda")
    bias[1] = -torch.inf
    state, _ = new_state(q, k)
    for _ in range(3):
        out, lse = attend(q, k, v, state, 0, -8.0, 0.125, lse=True, key_bias=bias)
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    assert out[0].isfinite().all()
    assert lse[0].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_protected_tiles_are_computed_though_the_state_marks_everything(kernel: str) -> None:
    q, k, v = make((1, 2, 1024, 1024, 64), torch.bfloat16)
    state, tile = new_state(q, k, kernel)
    state[0, ..., 0] = 7
    state[0, ..., row_layout(tile_count(1024, tile.k)).mask_start :] = -1
    protected = (0, 1, 500, 510)
    out, _ = attend(q, k, v, state, 0, -8.0, 0.125, protected=protected, kernel=kernel)
    keys = touched_tiles(tile_count(1024, tile.k), tile.k, protected).repeat_interleave(tile.k)[:1024].cuda()
    rows = touched_tiles(tile_count(1024, tile.q), tile.q, protected).repeat_interleave(tile.q)[:1024].cuda()
    mask = rows[:, None] | keys
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.125)
    assert (out - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("slot", [-1, 0])
def test_kinds_of_key_tiles(kernel: str, slot: int) -> None:
    """The state marks everything: the tiles that are always computed are left; without a slot, all not hidden."""
    q, k, v = make((1, 2, 1024, 1024, 64), torch.bfloat16)
    state, tile = new_state(q, k, kernel)
    state[0, ..., 0] = 7
    state[0, ..., row_layout(tile_count(1024, tile.k)).mask_start :] = -1
    table = range_table(KeyRanges(((300, 310), (-5, None)), ((0, 260), (700, 701)))).cuda()
    kinds, bias = find_key_tiles(table, k, tile.k), hide_keys(table, k)
    out, _ = attend(q, k, v, state, slot, -8.0, 0.125, key_bias=bias, kernel=kernel, kinds=kinds)
    seen = (kinds == COMPUTED_TILE if slot == 0 else kinds != HIDDEN_TILE).repeat_interleave(tile.k)[:1024]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=(seen & (bias[0] == 0)).expand(1024, -1), scale=0.125)
    assert (out - expected).norm() < 2e-2 * expected.norm()
    if slot == 0:
        assert (state[0, ..., 1] == int((kinds == COMPUTED_TILE).sum())).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_states_with_kinds_of_key_tiles_follow_the_reference(kernel: str) -> None:
    q, k, v = make((2, 2, 1100, 1100, 128), torch.bfloat16, sharpness=4.0)
    state, tile = new_state(q, k, kernel)
    expected = state.cpu()
    table = range_table(KeyRanges(((300, 310),), ((0, 260), (-140, None)))).cuda()
    kinds, bias = find_key_tiles(table, k, tile.k), hide_keys(table, k)
    now = torch.tensor([7, 0, 1, 1, 0], dtype=torch.int32)
    doubles = [x.double().cpu() for x in (q, k, v)]
    k_tiles = tile_count(1100, tile.k)
    start = row_layout(k_tiles).mask_start
    for _ in range(3):
        out, _ = attend(q, k, v, state, 1, -8.0, 128**-0.5, key_bias=bias, kernel=kernel, kinds=kinds)
        limit, kinds_there = torch.tensor(-8.0), kinds.cpu()
        reference, _ = attend_reference(
            *doubles, expected, now, 128**-0.5, limit, tile, bias.cpu(), key_tiles=kinds_there
        )  # fmt: skip
        assert (out.cpu().double() - reference).norm() < 2e-2 * reference.norm()
        ours, theirs = (unpack_bits(s[1, ..., start:].cpu(), k_tiles) for s in (state, expected))
        assert (ours != theirs).sum() <= 0.01 * ours.numel()
        expected.copy_(state.cpu())
    assert ours[..., (kinds == HIDDEN_TILE).cpu()].all()
    assert not ours[..., (kinds == COMPUTED_TILE).cpu()].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 2304, 2304, 64), (2, 4, 1000, 3000, 128), (1, 2, 500, 500, 256)], ids=str)
def test_the_probe_is_the_mass_of_the_skipped_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = make(shape, dtype, sharpness=4.0)
    k, v = k[:, :1], v[:, :1]
    state, tile = new_state(q, k)
    bias = padding("infinite", shape[0], shape[3])
    scale = shape[4] ** -0.5
    for step in range(3):
        now = torch.tensor([7, step, 1, 1, 0], dtype=torch.int32, device="cuda")
        found, same = torch.ops.lite_compile.dropped_mass(q, k, state, now, scale, tile.q, tile.k, bias)
        assert torch.equal(same, now)
        given = (q.double().cpu(), k.double().cpu(), state.cpu(), now.cpu(), scale, tile, bias.cpu())
        torch.testing.assert_close(found.cpu(), dropped_mass(*given), rtol=1e-2, atol=1e-6)
        assert bool(found.any()) == (step > 0)
        attend(q, k, v, state, 1, -2.0, scale, key_bias=bias)
    assert not torch.ops.lite_compile.dropped_mass(q, k, state, -now, scale, tile.q, tile.k, bias)[0].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_oracle_detection(kernel: str) -> None:
    q, k, v = make((1, 2, 2304, 2304, 64), torch.bfloat16, sharpness=4.0)
    scale, threshold = 0.125, -8.0
    state, tile = new_state(q, k, kernel)
    for _ in range(3):
        attend(q, k, v, state, 0, threshold, scale, kernel=kernel)
    scores = (q.double() @ k.double().transpose(-1, -2)) * scale * 1.4426950408889634
    tiles = scores.unflatten(2, (-1, tile.q)).unflatten(4, (-1, tile.k))
    gap = (tiles.amax(-1) - scores.amax(-1).unflatten(2, (-1, tile.q))[..., None]).amax(3)
    oracle, strict = gap <= threshold, gap <= threshold + 1e-2
    marked = unpack_bits(state[0, ..., row_layout(oracle.shape[-1]).mask_start :], oracle.shape[-1])
    assert not (marked & ~strict).any()
    assert (marked & oracle).sum() >= 0.9 * oracle.sum()
    assert oracle.float().mean() > 0.3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threshold", [float("nan"), 0.5])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_threshold_that_is_positive_or_nan_marks_nothing(threshold: float, kernel: str, criterion: str) -> None:
    q, k, v = make((1, 2, 1024, 1024, 64), torch.bfloat16, sharpness=4.0)
    state, tile = new_state(q, k, kernel)
    start = row_layout(tile_count(1024, tile.k)).mask_start
    attend(q, k, v, state, 0, threshold, 0.125, kernel=kernel, criterion=criterion)
    assert not state[0, ..., start:].any()
    attend(q, k, v, state, 0, -8.0, 0.125, kernel=kernel, criterion=criterion)
    marked = state[0, ..., start:].clone()
    assert marked.any()
    attend(q, k, v, state, 0, threshold, 0.125, kernel=kernel, criterion=criterion)
    assert torch.equal(state[0, ..., start:], marked)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_stale_epoch_reads_as_empty(kernel: str) -> None:
    q, k, v = make((1, 2, 1024, 1024, 64), torch.bfloat16, sharpness=4.0)
    state, _ = new_state(q, k, kernel)
    fresh = state.clone()
    attend(q, k, v, fresh, 0, -8.0, 0.125, kernel=kernel)
    state[0, ..., 0] = 3
    state[0, ..., 1:] = -1
    out, _ = attend(q, k, v, state, 0, -8.0, 0.125, kernel=kernel)
    dense, _ = attend(q, k, v, fresh, -1, -8.0, 0.125, kernel=kernel)
    assert torch.equal(out, dense)
    assert torch.equal(state, fresh)


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_than_two_to_the_31_elements(kernel: str) -> None:
    q = torch.randn(1, 1, 64, 128, device="cuda", dtype=torch.bfloat16).expand(1, 2, 64, 128).contiguous()
    big = torch.empty(1, 2, 9_000_000, 128, device="cuda", dtype=torch.bfloat16)
    big[:] = 0
    big[:, :, -64:] = torch.randn(1, 1, 64, 128, device="cuda", dtype=torch.bfloat16) * 3
    state, _ = new_state(q, big, kernel)
    out, _ = attend(q, big, big, state, -1, -8.0, 1.0, kernel=kernel)
    expected = F.scaled_dot_product_attention(q, big, big, scale=1.0)
    assert (out - expected).norm() < 2e-2 * expected.norm()
