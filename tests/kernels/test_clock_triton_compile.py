"""Compiles the kernels of the step clock for GPUs that need not be there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lite_compile.kernels import clock_inputs_triton, clock_triton  # noqa: E402

ARCHITECTURES = (80, 89, 90, 100)


def compile_offline(arch: int, kernel: Any, constants: dict[str, Any], stage: str = "ptx", **types: str) -> str:
    """Code for `sm_<arch>`; arguments that are not named are int32."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()}
    )
    code: str = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm[stage]
    return code


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "i64"])
def test_what_reads_inputs(arch: int, dtype: str) -> None:
    for size in ("i32", "i64"):
        assert ".entry compare_latents" in compile_offline(
            arch, clock_inputs_triton.compare_latents, {"IS_LARGE": size == "i64"}, x=f"*{dtype}", clock="*i32",
            samples="*fp32", verdicts="*fp32", size=size,
        )  # fmt: skip
        ptx = compile_offline(
            arch,
            clock_inputs_triton.project,
            {"BLOCK": 1024, "IS_WIDE": dtype != "bf16"},
            x=f"*{dtype}",
            partials="*fp64",
            size=size,
        )
        assert "fma.rn.f64" in ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("programs", [1, 512])
def test_what_decides(arch: int, counted: bool, programs: int) -> None:
    number = "i32" if counted else "fp32"
    ptx = compile_offline(
        arch, clock_triton.decide, {"SLOTS": 4, "PROGRAMS": programs, "COUNT_FIRST": counted, "COUNT_LAST": counted},
        clock="*i32", samples="*fp32", verdicts="*fp32", partials="*fp64", timestep="*fp32", now="*i32",
        dense_first=number, dense_last=number,
    )  # fmt: skip
    assert "bar.sync" in ptx


def test_sizes_close_to_what_32_bits_hold_are_rounded_up_in_64() -> None:
    """Rounded up in 32 bits, a size of 2^31 - 1 is negative: no element would count."""
    types = {"x": "*i8", "clock": "*i32", "samples": "*fp32", "verdicts": "*fp32", "partials": "*fp64"}
    for kernel, constants in (
        (clock_inputs_triton.compare_latents, {"IS_LARGE": True}),
        (clock_inputs_triton.project, {"BLOCK": 1024, "IS_WIDE": True}),
    ):
        named = {name: types[name] for name in kernel.arg_names if name in types}
        code = compile_offline(90, kernel, constants, "ttir", **named)
        assert not re.search(r"arith.(addi|subi) %size\b", code), code
        assert re.search(r"arith.extsi %size : i32 to i64", code), code


@pytest.mark.parametrize("size", [2**30 - 1, 2**30, 2**31 - 1, 2**31])
def test_sizes_that_triton_takes_as_another_type_are_of_another_variant(size: int) -> None:
    """What was compiled for int32 would cut off the upper half of an int64."""
    found, smaller = (clock_triton._kind_of(torch.empty(n, dtype=torch.int8, device="meta")) for n in (size, 2**30))
    assert (found == smaller) == (2**30 <= size < 2**31)
    assert found.is_large or size < 2**30
