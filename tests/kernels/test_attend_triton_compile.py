"""Compiles `attend_triton`'s kernel for GPUs that need not be there, and checks what the compilers made of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from kernel_resources import (  # noqa: E402
    BF16,
    BLOCK_SHARED_KB,
    FP16,
    FP32,
    POINTERS,
    Build,
    compile_attend_triton,
    occupancy,
    resource_usage,
)  # fmt: skip
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lite_compile.kernels import attend_triton, dropped_mass_triton  # noqa: E402

TMA_LOAD = "cp.async.bulk.tensor"
MATRIX_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [(arch, BF16, head_dim) for arch in (80, 89, 90, 100) for head_dim in (64, 128)]
    + [(90, FP16, head_dim) for head_dim in (36, 64, 72, 100, 128, 256)]
    + [(80, BF16, 80), (89, FP16, 256), (90, FP32, 64)],
)
@pytest.mark.parametrize(
    ("has_bias", "has_kinds"), [(False, False), (True, False), (True, True)], ids=["plain", "bias", "bias-kinds"]
)
@pytest.mark.parametrize("by_mass", [False, True], ids=["max", "mass"])
def test_compiles_for(
    arch: int, dtype: torch.dtype, head_dim: int, has_bias: bool, has_kinds: bool, by_mass: bool
) -> None:
    build = compile_attend_triton(arch, dtype, head_dim, has_bias=has_bias, has_kinds=has_kinds, by_mass=by_mass)
    print(
        f"sm_{arch} {dtype} D={head_dim} bias={has_bias} kinds={has_kinds} mass={by_mass}: "
        f"{build.registers} registers, "
        f"{build.spilled_bytes} bytes spilled, {build.shared_bytes / 1024:.0f} KB shared, "
        f"{build.ptx.count('cp.async.c')} cp.async, {build.ptx.count(TMA_LOAD)} by TMA"
    )
    assert build.shared_bytes <= BLOCK_SHARED_KB[arch] * 1024
    assert MATRIX_INSTRUCTION.search(build.ptx)
    # The loads of the main loop are pipelined: in pieces of 16 bytes, of fewer where rows start anywhere, or by TMA.
    by_tma = arch == 90 and dtype is not FP32 and head_dim in (64, 72, 128)
    assert (TMA_LOAD in build.ptx) == by_tma
    assert ("cp.async.c" in build.ptx) == (has_bias or not by_tma)
    if not by_tma and head_dim % 8 == 0:
        assert "cp.async.cg" in build.ptx
    if head_dim in (64, 128) or by_tma:
        assert build.spilled_bytes == 0


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (BF16, 128), (FP16, 80), (FP16, 256), (FP32, 128)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_probe_compiles_for(arch: int, dtype: torch.dtype, head_dim: int, has_bias: bool) -> None:
    kernel = dropped_mass_triton._dropped_mass_kernel
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "TILE_Q": 128, "TILE_K": 64,
        "HAS_BIAS": has_bias, "q_stride_d": 1, "k_stride_d": 1,
    }  # fmt: skip
    if not has_bias:
        constants["key_bias"] = None
    types = {"q": POINTERS[dtype], "k": POINTERS[dtype], "key_bias": "*fp32", "state": "*i32", "now": "*i32"}
    types |= {"parts": "*fp32", "qk_scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(signature) if name in ("q", "k") or "_stride_" in name]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dropped_mass_triton.LAUNCH)
    registers, spilled = resource_usage(built.asm["cubin"], "_dropped_mass_kernel")
    print(f"sm_{arch} {dtype} D={head_dim} bias={has_bias}: {registers} registers, {spilled} bytes spilled")
    assert built.metadata.shared <= BLOCK_SHARED_KB[arch] * 1024
    assert spilled == 0 or dtype is FP32


@pytest.mark.parametrize(
    ("arch", "registers", "shared_kb", "warps", "expected"),
    [
        (80, 255, 48, 8, (1, "registers")), (80, 168, 48, 4, (3, "registers")), (89, 128, 64, 8, (1, "shared memory")),
        (90, 64, 20, 4, (8, "registers")), (89, 32, 1, 8, (6, "threads")), (90, 168, 113, 4, (2, "shared memory")),
    ],
)  # fmt: skip
def test_occupancy(arch: int, registers: int, shared_kb: int, warps: int, expected: tuple[int, str]) -> None:
    assert occupancy(arch, Build("", registers, 0, shared_kb * 1024), warps) == expected


@pytest.mark.parametrize(
    ("capability", "same_as"), [((8, 7), (8, 6)), ((8, 9), (8, 6)), ((10, 3), (10, 0)), ((13, 0), (12, 0))]
)
def test_unknown_capability_takes_the_nearest_lower_class(
    capability: tuple[int, int], same_as: tuple[int, int]
) -> None:
    for dtype in (BF16, FP32):
        for head_dim in (16, 96, 256):
            expected = attend_triton.triton_tile(same_as, dtype, head_dim)
            assert attend_triton.triton_tile(capability, dtype, head_dim) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "tile"),
    [
        ((9, 0), BF16, 16, (64, 128)), ((9, 0), FP16, 64, (64, 128)), ((9, 0), FP16, 72, (128, 128)),
        ((9, 1), BF16, 128, (128, 128)), ((9, 0), BF16, 36, None), ((9, 0), BF16, 100, None),
        ((9, 0), BF16, 136, None), ((9, 0), FP32, 64, None), ((8, 9), BF16, 64, None), ((10, 0), BF16, 128, None),
    ],
)  # fmt: skip
def test_tma_is_for_hopper_and_what_it_can_step_over(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, tile: tuple[int, int] | None
) -> None:
    assert attend_triton._launch_config(capability, dtype, head_dim).by_tma == (tile is not None)
    if tile is not None:
        assert attend_triton.triton_tile(capability, dtype, head_dim) == tile


def test_old_capability_is_named() -> None:
    with pytest.raises(ValueError, match=r"7\.5"):
        attend_triton.triton_tile((7, 5), FP16, 64)
