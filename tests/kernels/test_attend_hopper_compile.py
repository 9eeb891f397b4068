"""Compiles the Gluon kernel for Hopper, which need not be there, and checks what the compilers made of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from kernel_resources import Build, resource_usage  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from lite_compile.kernels import attend_hopper, hopper_short_rows, hopper_workers, tma_blocks, visit_lists  # noqa: E402
from lite_compile.kernels.select_kernel import hopper_obstacle  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHARED_KB = 227
ELEMENTS = {BF16: "bf16", FP16: "fp16", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}


def build_offline(
    dtype: torch.dtype, head_dim: int, qk: torch.dtype | None = None, short: bool = False, **constants: bool
) -> Any:
    """Compile for sm_90 with 16-byte aligned pointers. `constants` that are not given are false."""
    qk = dtype if qk is None else qk

    def block(kind: torch.dtype, rows: int) -> str:
        shape, layout = tma_blocks.block_layout(kind, rows, head_dim)
        return f"tensordesc<{ELEMENTS[kind]}[{','.join(map(str, shape))}],{layout!r}>"

    kernel = hopper_short_rows.attend_short_kernel if short else hopper_workers.attend_kernel
    own = ("HAS_KINDS", "HAS_RANGES") if short else ("EVEN_K",)
    fixed: dict[str, Any] = dict.fromkeys((*own, "HAS_LSE", "HAS_BIAS", "BY_MASS"), False)
    fixed |= constants
    fixed["QK_BITS"] = 8 * qk.itemsize
    if not short:
        fixed["FIXED_SHIFT"] = attend_hopper._fixes_shift(dtype, head_dim, fixed["HAS_BIAS"])
    optional = {
        "lse": fixed["HAS_LSE"],
        "key_bias": fixed["HAS_BIAS"],
        "biased": fixed["HAS_BIAS"],
        "q_scales": qk != dtype,
        "k_scales": qk != dtype,
        "key_tiles": fixed.get("HAS_KINDS", False),
    }
    fixed |= {name: None for name, given in optional.items() if not given and name in kernel.arg_names}
    types = {"q_desc": block(qk, 64), "k_desc": block(qk, 128), "v_desc": block(dtype, 128), "o_desc": block(dtype, 64)}
    types |= dict.fromkeys((*optional, "threshold"), "*fp32") | {"qk_scale": "fp32"}
    types |= {
        "state": "*i32",
        "now": "*i32",
        "key_tiles": "*i8",
        "counter": "*i32",
        "biased": "*i8",
        "order": "*i16",
        "notes": "*i8",
        "counts": "*i32",
        "queue": "*i64",
    }
    types |= dict.fromkeys(fixed, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    anywhere = ("threshold", "state", "now", "key_tiles", "counter")
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") and name not in anywhere]
    source = GluonASTSource(kernel, signature, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_offline(*given: Any, **constants: bool) -> Build:
    """What `build_offline` compiles, and what it takes."""
    built = build_offline(*given, **constants)
    return Build(built.asm["ptx"], *resource_usage(built.asm["cubin"], built.name), built.metadata.shared)


def unpublished_stores(ptx: str) -> list[str]:
    """Where one of several threads that have written lists or notes goes on before the others have written.

    That is, loads from there or tells an mbarrier; looked for in the order in which the instructions stand.
    """
    found, pending = [], False
    for line in ptx.splitlines():
        if re.search(r"\bst\.global\.b(8|16)\b", line):
            pending = True
        elif re.search(r"\bbar\.(warp\.)?sync\b", line):
            pending = False
        elif pending and re.search(r"\bmbarrier\.arrive\b|\bld\.global\.b(8|16)\b", line):
            found.append(line.strip())
    return found


@pytest.mark.parametrize(
    ("dtype", "head_dim", "qk", "constants", "spilled"),
    [
        (BF16, 64, None, {"EVEN_K": True}, 0),
        (BF16, 128, None, {"EVEN_K": True}, 128),
        (BF16, 128, None, {}, 192),
        (BF16, 128, None, {"HAS_LSE": True}, None),
        (FP16, 96, None, {}, 192),
        (BF16, 64, None, {"HAS_BIAS": True}, None),
        (BF16, 128, None, {"HAS_BIAS": True}, None),
        (BF16, 128, torch.int8, {}, 192),
        (BF16, 128, torch.float8_e4m3fn, {"EVEN_K": True}, 192),
        (BF16, 128, torch.int8, {"HAS_BIAS": True}, None),
        (BF16, 64, torch.int8, {}, 16),
        (FP16, 64, torch.float8_e4m3fn, {}, 16),
        (BF16, 64, None, {"short": True}, 256),
        (BF16, 128, None, {"short": True}, 256),
        (BF16, 128, None, {"short": True, "HAS_RANGES": True}, 256),
        (FP16, 96, None, {"short": True, "HAS_LSE": True, "HAS_BIAS": True, "HAS_KINDS": True}, None),
        (BF16, 128, torch.int8, {"short": True}, 256),
        (BF16, 64, torch.float8_e4m3fn, {"short": True}, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("by_mass", [False, True], ids=["max", "mass"])
def test_compiles_for_hopper(
    dtype: torch.dtype, head_dim: int, qk: torch.dtype | None, constants: dict[str, bool], spilled: int | None,
    by_mass: bool,
) -> None:  # fmt: skip
    """`spilled`: most bytes that may be; None: any number.

    At a head dim of 128 all of the 160 registers are in use: Triton 3.6 spills up to 48 bytes without a bias, 3.9 more.
    Where rows are short the producer spills as well, which has 32 registers and time to spare.
    """
    build = compile_offline(dtype, head_dim, qk, BY_MASS=by_mass, **constants)
    print(
        f"triton {triton.__version__} {dtype} D={head_dim} qk={qk} {constants} mass={by_mass}: "
        f"{build.registers} registers, {build.spilled_bytes} bytes spilled, {build.shared_bytes / 1024:.0f} KB shared"
    )
    assert build.shared_bytes <= SHARED_KB * 1024
    assert "wgmma.mma_async" in build.ptx
    assert "cp.async.bulk.tensor" in build.ptx
    assert "setmaxnreg" in build.ptx
    assert not constants.get("short") or unpublished_stores(build.ptx) == []
    fixes_shift = dtype == BF16 and head_dim > 64 and not constants.keys() & {"HAS_BIAS", "short"}
    assert ("min.u32" in build.ptx) is fixes_shift
    offsets = qk == torch.int8 and not fixes_shift and "HAS_BIAS" not in constants
    assert (str(0x4B400000) in build.ptx) is offsets
    assert not re.search(r"\bbar\.sync\s+\d+;", build.ptx)  # each barrier is one of a partition's threads
    assert spilled is None or build.spilled_bytes <= spilled


@pytest.mark.parametrize(("short", "variables"), [(False, 5), (True, 6)])
def test_no_variable_of_the_producers_loop_is_lost(short: bool, variables: int) -> None:
    """MLIR takes one that begins as another does, and becomes what that one was, for one that never changes."""
    carried = re.findall(r"scf\.while .*-> \(?([^)]*?)\)? \{", build_offline(BF16, 128, short=short).asm["ttgir"])
    assert max(types.count(",") + 1 for types in carried) == variables


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
    addressed = tma_blocks.addressable(x)
    assert (addressed is x) is in_place
    assert tma_blocks.is_addressable(addressed)
    assert torch.equal(addressed, x)
    described = tma_blocks.tma_descriptor(addressed, 64)
    assert described.base.data_ptr() == addressed.data_ptr()
    assert all(stride * x.itemsize % 16 == 0 for stride in described.strides[:-1])


def test_descriptors_are_made_once_per_address() -> None:
    x, other = torch.zeros(2, 1, 3, 70, 64, dtype=BF16)
    first = tma_blocks.tma_descriptor(x, 64)
    assert tma_blocks.tma_descriptor(x.clone().set_(x), 64) is first
    for unlike in (tma_blocks.tma_descriptor(other, 64), tma_blocks.tma_descriptor(x, 128)):
        assert unlike is not first
    assert tma_blocks.tma_descriptor(x[:, :, :69], 64).shape != first.shape
    assert tma_blocks.tma_descriptor(x.view(torch.float16), 64).base.dtype == torch.float16


@pytest.mark.parametrize("name", ["list_visits", "record_visits", "queue_programs", "flag_biased"])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kinds", [False, True])
def test_lists_compile(name: str, arch: int, kinds: bool) -> None:
    kernel = getattr(visit_lists, name)
    given = {"TILE_Q": 192, "TILE_K": 128, "HAS_KINDS": kinds} | ({} if kinds else {"key_tiles": None})
    constants = {constant: value for constant, value in given.items() if constant in kernel.arg_names}
    types = {
        "state": "*i32",
        "now": "*i32",
        "order": "*i16",
        "counts": "*i32",
        "notes": "*i8",
        "queue": "*i64",
        "key_bias": "*fp32",
        "flags": "*i8",
        "key_tiles": "*i8",
    }
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 2}).asm["ptx"]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "named"),
    [
        ((8, 0), BF16, 128, "9.0, this device has 8.0"),
        ((10, 0), BF16, 128, "this device has 10.0"),
        ((9, 0), FP32, 128, "not float32"),
        ((9, 0), BF16, 256, "256"),
        ((9, 0), BF16, 100, "100"),
    ],
)
def test_obstacles_are_named(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, named: str) -> None:
    obstacle = hopper_obstacle(capability, dtype, head_dim)
    assert obstacle is not None
    assert named in obstacle
    assert hopper_obstacle((9, 0), BF16, 128) is None
