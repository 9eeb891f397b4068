"""Compiles the kernel of norm and rotary embedding for GPUs that need not be there, as large models launch it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from kernel_resources import resource_usage  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lite_compile.kernels.rotary_triton import (  # noqa: E402
    MAX_ELEMENTS,
    is_supported,
    normalize_rotate_kernel,
    plan_launch,
)

ARCHITECTURES = (80, 89, 90, 100)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Model(NamedTuple):
    heads: int
    dim: int
    per_head: bool
    per_pair: bool


MODELS = {
    "Wan 1.3B": Model(12, 128, False, True),
    "Wan 14B": Model(40, 128, False, True),
    "LTX": Model(1, 2048, False, False),
    "Flux": Model(24, 128, True, False),
    "the largest token": Model(1, MAX_ELEMENTS, False, False),
    "the most heads": Model(128, 128, True, True),
}


def compile_offline(arch: int, model: Model, dtype: torch.dtype, has_weight: bool = True) -> Any:
    """What `plan_launch` launches, for `sm_<arch>`."""
    heads, dim, per_head, per_pair = model
    x = torch.empty(1, 64, heads, dim, dtype=dtype)
    weight = torch.empty(dim if per_head else heads * dim, dtype=dtype) if has_weight else None
    table = torch.empty(1, 64, 1, dim)[..., 0::2] if per_pair else torch.empty(1, 64, 1, dim)
    _, arguments, constants = plan_launch(x, weight, 1e-6, per_head, table, table, x)
    warps = constants.pop("num_warps")
    names = normalize_rotate_kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    constants |= {
        name: value for name, value in given.items() if value is None or (isinstance(value, int) and value == 1)
    }
    signature = {name: _type_of(value) for name, value in given.items()} | dict.fromkeys(constants, "constexpr")
    aligned = [
        i for i, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and given[name] % 16 == 0)
    ]  # fmt: skip
    source = ASTSource(
        normalize_rotate_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_stay_in_registers(name: str, arch: int) -> None:
    """Memory is read once and written once, in whole words, and nothing is spilled."""
    model = MODELS[name]
    for has_weight in (True, False):
        built = compile_offline(arch, model, torch.bfloat16, has_weight)
        registers, spilled = resource_usage(built.asm["cubin"], "normalize_rotate_kernel")
        print(f"sm_{arch} {name}: {registers} registers, {spilled} bytes spilled")
        assert spilled == 0
        assert built.asm["ptx"].count("st.global.v4") >= 1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "model", [Model(3, 6, False, False), Model(1, 2, True, True), Model(5, 96, True, False)], ids=str
)
def test_odd_shapes_and_other_dtypes(model: Model, dtype: torch.dtype) -> None:
    for arch in (ARCHITECTURES[0], ARCHITECTURES[-1]):
        assert ".entry normalize_rotate_kernel" in compile_offline(arch, model, dtype).asm["ptx"]


@pytest.mark.parametrize(
    ("heads", "dim", "expected"),
    [(1, 2, True), (1, 3, False), (40, 128, True), (128, 128, True), (129, 128, False), (1, MAX_ELEMENTS + 2, False)],
)
def test_what_fits(heads: int, dim: int, expected: bool) -> None:
    assert is_supported(heads, dim) == expected
