"""Compiles `attend_triton`'s kernel for GPUs that need not be there, and checks what the compilers made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lite_compile.kernels import attend_triton, dropped_mass_triton  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32"}
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TMA_LOAD = "cp.async.bulk.tensor"
MATRIX_INSTRUCTION = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


class Build(NamedTuple):
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_offline(
    arch: int, dtype: torch.dtype, head_dim: int, even_k: bool = False, has_bias: bool = False,
    has_kinds: bool = False, by_mass: bool = False,
) -> Build:  # fmt: skip
    """Compile for `sm_<arch>` what is launched there; 16-byte aligned pointers and strides."""
    kernel = attend_triton._attend_kernel
    config = attend_triton._launch_config(divmod(arch, 10), dtype, head_dim)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim),
        "TILE_Q": config.tile.q, "TILE_K": config.tile.k, "EVEN_K": even_k, "HAS_BIAS": has_bias, "HAS_LSE": True,
        "BY_MASS": by_mass, "HAS_KINDS": has_kinds, "BY_TMA": config.by_tma,
    }  # fmt: skip
    if not has_bias:
        constants["key_bias"] = None
    if not has_kinds:
        constants["key_tiles"] = None
    types = dict.fromkeys(("q", "k", "v", "out"), POINTERS[dtype])
    if config.by_tma:
        rows = {"q": config.tile.q, "k": config.tile.k, "v": config.tile.k}
        columns = constants["BLOCK_D"]
        types |= {name: f"tensordesc<{POINTERS[dtype][1:]}[1,1,{rows[name]},{columns}]>" for name in rows}
    types |= {
        "key_bias": "*fp32",
        "lse": "*fp32",
        "state": "*i32",
        "now": "*i32",
        "scratch": "*i16",
        "key_tiles": "*i8",
    }
    types |= {"qk_scale": "fp32", "threshold": "*fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*") and name != "threshold"]
    aligned = [i for i, name in enumerate(signature) if name in pointers or "_stride_" in name]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Build(built.asm["ptx"], *resource_usage(built.asm["cubin"]), built.metadata.shared)


def resource_usage(cubin: bytes, function: str = "_attend_kernel") -> tuple[int, int]:
    """Registers per thread and bytes of stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {function}:\s*REG:(\d+) STACK:(\d+)", listing)
    assert found, listing
    return int(found[1]), int(found[2])


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
    build = compile_offline(arch, dtype, head_dim, has_bias=has_bias, has_kinds=has_kinds, by_mass=by_mass)
    print(
        f"sm_{arch} {dtype} D={head_dim} bias={has_bias} kinds={has_kinds} mass={by_mass}: "
        f"{build.registers} registers, "
        f"{build.spilled_bytes} bytes spilled, {build.shared_bytes / 1024:.0f} KB shared, "
        f"{build.ptx.count('cp.async.c')} cp.async, {build.ptx.count(TMA_LOAD)} by TMA"
    )
    assert build.shared_bytes <= SHARED_KB[arch] * 1024
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
    assert built.metadata.shared <= SHARED_KB[arch] * 1024
    assert spilled == 0 or dtype is FP32


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
