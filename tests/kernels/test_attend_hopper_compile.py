"""Compiles the Gluon kernel for Hopper, which need not be there, and checks what the compilers made of it."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from test_attend_triton_compile import POINTERS, Build, resource_usage  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from lite_compile.kernels import attend_hopper, visit_lists  # noqa: E402
from lite_compile.kernels.select_kernel import hopper_obstacle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_KB = 227


def compile_offline(dtype: torch.dtype, head_dim: int, even_k: bool, has_lse: bool) -> Build:
    """Compile for sm_90 with 16-byte aligned pointers."""

    def block(rows: int) -> str:
        shape, layout = attend_hopper.block_layout(dtype, rows, head_dim)
        return f"tensordesc<{POINTERS[dtype][1:]}[{','.join(map(str, shape))}],{layout!r}>"

    kernel = attend_hopper._attend_kernel
    constants = {"EVEN_K": even_k, "HAS_LSE": has_lse} | ({} if has_lse else {"lse": None})
    types = {"q_desc": block(64), "k_desc": block(128), "v_desc": block(128), "o_desc": block(64)}
    types |= {
        "lse": "*fp32",
        "order": "*i16",
        "counts": "*i32",
        "notes": "*i8",
        "qk_scale": "fp32",
        "threshold": "*fp32",
    }
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") and name != "threshold"]
    source = GluonASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return Build(built.asm["ptx"], *resource_usage(built.asm["cubin"]), built.metadata.shared)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "even_k", "has_lse"),
    [
        (BF16, 64, True, False),
        (BF16, 128, True, False),
        (BF16, 128, False, False),
        (BF16, 128, False, True),
        (FP16, 96, False, False),
    ],
)
def test_compiles_for_hopper(dtype: torch.dtype, head_dim: int, even_k: bool, has_lse: bool) -> None:
    build = compile_offline(dtype, head_dim, even_k, has_lse)
    print(
        f"triton {triton.__version__} {dtype} D={head_dim}: {build.registers} registers, {build.spilled_bytes} bytes "
        f"spilled, {build.shared_bytes / 1024:.0f} KB shared"
    )
    assert build.shared_bytes <= SHARED_KB * 1024
    assert "wgmma.mma_async" in build.ptx
    assert "cp.async.bulk.tensor" in build.ptx
    assert "setmaxnreg" in build.ptx
    # At a head dim of 128 all of the 160 registers are in use: Triton 3.6 spills nothing, 3.9 some bytes. Models ask
    # for no LSE.
    if not has_lse:
        assert build.spilled_bytes <= (0 if head_dim <= 64 else 136)


ROWS = torch.arange(2 * 70 * 3 * 64).view(2, 70, 3, 64).to(BF16)


@pytest.mark.parametrize(
    ("x", "in_place"),
    [
        (ROWS.transpose(1, 2), True),
        (ROWS[:1, :1].transpose(1, 2), True),
        (ROWS.transpose(1, 2)[..., :32], True),
        (ROWS.flatten()[3 : 3 + 64].view(1, 1, 1, 64), False),
        (ROWS.flatten()[1 : 1 + 2 * 5 * 64].view(1, 2, 5, 64), False),
        (ROWS.transpose(1, 2).mT[..., :64], False),
        (ROWS[:, :, :1].expand(2, 70, 3, 64), False),
        (torch.zeros(2, 3, 7, 68, dtype=BF16)[..., :64], False),
    ],
)  # fmt: skip
def test_descriptors_are_of_what_tma_can_address(x: torch.Tensor, in_place: bool) -> None:
    described = attend_hopper._descriptor(x, 64)
    assert (described.base is x) is in_place
    assert attend_hopper.is_addressable(described.base)
    assert all(stride * x.itemsize % 16 == 0 for stride in described.strides[:-1])
    assert torch.equal(described.base, x)


@pytest.mark.parametrize("name", ["list_visits", "record_visits"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_lists_compile(name: str, arch: int) -> None:
    kernel = getattr(visit_lists, name)
    constants = {"TILE_Q": 192, "TILE_K": 128}
    types = {"state": "*i32", "now": "*i32", "order": "*i16", "counts": "*i32", "notes": "*i8"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 2}).asm["ptx"]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "biased", "named"),
    [
        ((8, 0), BF16, 128, False, "9.0, this device has 8.0"),
        ((10, 0), BF16, 128, False, "this device has 10.0"),
        ((9, 0), FP32, 128, False, "not float32"),
        ((9, 0), BF16, 256, False, "256"),
        ((9, 0), BF16, 100, False, "100"),
        ((9, 0), BF16, 128, True, "mask"),
    ],
)
def test_obstacles_are_named(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, biased: bool, named: str
) -> None:
    obstacle = hopper_obstacle(capability, dtype, head_dim, biased)
    assert obstacle is not None
    assert named in obstacle
    assert hopper_obstacle((9, 0), BF16, 128, False) is None
