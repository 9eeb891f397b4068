"""What the portable kernel is compiled to for GPUs that need not be there: registers, spills, shared memory, occupancy.

    python benchmarks/kernel_resources.py --json FILE

Its launch configurations for cards that were not at hand were chosen by these figures.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lite_compile.kernels import attend_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32"}
SHARED_KB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
"""Of a multiprocessor, by compute capability (CUDA programming guide, technical specifications)."""
REGISTERS, RESERVED_KB = 65536, 1
"""Registers of a multiprocessor; shared memory that the driver keeps of each block's."""
BLOCK_SHARED_KB = {arch: shared - RESERVED_KB for arch, shared in SHARED_KB.items()}
"""The most that a block may have."""


class Build(NamedTuple):
    """What the compilers made of a kernel."""

    ptx: str
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Per thread, in local memory."""
    shared_bytes: int
    """Per block."""


def compile_attend_triton(
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


def occupancy(arch: int, build: Build, warps: int) -> tuple[int, str]:
    """Blocks that a multiprocessor holds at once, and what there are not more of: registers, shared memory, threads."""
    per_warp = -(-build.registers * 32 // 256) * 256  # registers are handed out to warps in units of 256
    shared = build.shared_bytes / 1024 + RESERVED_KB
    limits = {
        "registers": REGISTERS // (per_warp * warps),
        "shared memory": int(SHARED_KB[arch] / shared),
        "threads": THREADS[arch] // (32 * warps),
    }
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    cases = [(arch, dim, bias) for arch in SHARED_KB for dim in (64, 128, 256) for bias in (False, True)]
    rows = []
    for arch, head_dim, has_bias in tqdm(cases, "compiling", disable=None, leave=False):
        config = attend_triton._launch_config(divmod(arch, 10), BF16, head_dim)
        build = compile_attend_triton(arch, BF16, head_dim, has_bias=has_bias)
        blocks, limit = occupancy(arch, build, config.warps)
        row = {
            "arch": arch, "head_dim": head_dim, "bias": has_bias, "tile": [config.tile.q, config.tile.k],
            "warps": config.warps, "stages": config.stages, "tma": config.by_tma, "registers": build.registers,
            "spilled_bytes": build.spilled_bytes, "shared_kb": round(build.shared_bytes / 1024, 1),
            "blocks": blocks, "limit": limit,
        }  # fmt: skip
        rows.append(row)
        tqdm.write(" ".join(f"{name}={value}" for name, value in row.items()))
    if arguments.json:
        record = {"torch": torch.__version__, "triton": triton.__version__, "dtype": "bfloat16", "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
