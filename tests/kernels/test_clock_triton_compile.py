"""Compiles the kernels of the step clock for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lite_compile.kernels import clock_triton  # noqa: E402

ARCHITECTURES = (80, 89, 90, 100)


def compile_offline(arch: int, kernel: Any, constants: dict[str, Any], **types: str) -> str:
    """PTX for `sm_<arch>`; arguments that are not named are int32."""
    signature = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()}
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "i64"])
def test_what_reads_inputs(arch: int, dtype: str) -> None:
    for size in ("i32", "i64"):
        assert ".entry compare_latents" in compile_offline(
            arch, clock_triton.compare_latents, {"IS_LARGE": size == "i64"}, x=f"*{dtype}", clock="*i32",
            samples="*fp32", verdicts="*fp32", size=size,
        )  # fmt: skip
        ptx = compile_offline(
            arch,
            clock_triton.project,
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
