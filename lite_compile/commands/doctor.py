"""`liteattention doctor`: whether this machine and this installation can do what is wanted, and with which kernels."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..attention_bench import WrongResultError, bench_once
from ..decisions import format_table
from ..environment import describe_environment, installed_version, nvidia_smi
from ..kernels.select_kernel import Kernel, select_kernel

HELP = "Check versions, GPUs, kernels and the registration of the backend; exit status 1 if something is wrong."
MINIMUM = {"torch": (2, 11), "triton": (3, 6)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 96, 128, 192, 256)
PROBE = (1, 2, 512, 64)
"""`(B, H, S, D)` of the attention that each kernel is tried with."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    ok: bool
    text: str
    """What was found; and if it is not well, what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    """Print what there is and what is wrong; 1 if anything is."""
    for name, value in describe_environment().items():
        print(f"{name + ':':<14} {value}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    tables = [(device, kernel_table(device)) for device in devices]
    for device, table in tables:
        print(f"\nkernels on {device}, by head dim: name and tile size (queries x keys)")
        print("\n".join(table))
    print()
    failed = 0
    for check in checks(devices):
        print(f"{'ok   ' if check.ok else 'WRONG'}  {check.text}", flush=True)
        failed += not check.ok
    print(f"\n{failed} problem{'s' if failed != 1 else ''} found" if failed else "\nall is well")
    return 1 if failed else 0


def checks(devices: list[torch.device]) -> Iterator[Check]:
    """Everything that can be right or wrong; those that compute something come last."""
    yield check_version("torch", torch.__version__)
    if sys.platform == "linux":
        yield check_version("triton", installed_version("triton"))
    yield check_backend()
    yield check_gpus()
    for device in devices:
        yield from check_kernels(device)


def check_version(package: str, version: str) -> Check:
    """Whether a package is there and new enough."""
    wanted = ".".join(map(str, MINIMUM[package]))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return Check(False, f"{package} is {version}; {wanted} or newer is needed: pip install '{package}>={wanted}'")
    if tuple(map(int, found.groups())) < MINIMUM[package]:
        return Check(False, f"{package} {version} is too old: pip install '{package}>={wanted}'")
    return Check(True, f"{package} {version} ({wanted} or newer is needed)")


def check_backend() -> Check:
    """Whether `backend="liteattention"` finds this installation without importing it."""
    group = importlib.metadata.entry_points(group="torch_dynamo_backends")
    found = [entry for entry in group if entry.name == "liteattention"]
    if not found:
        advice = "install the package (pip install .) instead of putting its folder on the path"
        return Check(False, f'backend="liteattention" is not registered with torch.compile; {advice}')
    try:
        backend = found[0].load()
    except Exception as error:  # whatever its imports raise
        return Check(False, f'backend="liteattention" cannot be loaded: {type(error).__name__}: {error}')
    return Check(True, f'backend="liteattention" is registered: {backend.__module__}.{backend.__qualname__}')


def check_gpus() -> Check:
    """Whether torch sees the GPUs that the machine has."""
    seen, there = torch.cuda.device_count(), nvidia_smi("name")
    if not seen and there:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return Check(
            False,
            f"the driver knows {', '.join(there)}, but this torch ({build}) does not see it: install a build of torch "
            "for CUDA (https://pytorch.org/get-started), or look at CUDA_VISIBLE_DEVICES",
        )
    if not seen:
        return Check(True, "no GPU: attention runs on the CPU, which is there to develop and test with")
    return Check(True, f"torch sees {seen} GPU{'s' if seen > 1 else ''}")


def check_kernels(device: torch.device) -> Iterator[Check]:
    """Whether attention comes out right on a device, once per kernel that would be used for some dtype."""
    tried = set[tuple[str, torch.dtype]]()
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        kernel = select_kernel(device, dtype, PROBE[3])
        name = str(dtype).removeprefix("torch.")
        if isinstance(kernel, str):
            yield Check(False, f"{device}, {name}: no kernel, attention would stay dense: {kernel}")
        elif (kernel.name, dtype) not in tried:
            tried.add((kernel.name, dtype))
            yield try_kernel(device, dtype, kernel)


def try_kernel(device: torch.device, dtype: torch.dtype, kernel: Kernel) -> Check:
    """One small attention with half of its tiles skipped, against float64."""
    what = f"{device}, {str(dtype).removeprefix('torch.')}: kernel {kernel.name!r}"
    try:
        ours, dense = bench_once(PROBE, dtype, device, kernel)
    except WrongResultError as error:
        return Check(False, f"{what} computes something wrong ({error}); please report it")
    except Exception as error:  # compilers and drivers raise what they like
        first = str(error).strip().splitlines()[:1]
        return Check(False, f"{what} does not run: {type(error).__name__}: {''.join(first)}")
    return Check(True, f"{what} is right: relative error {ours:.1e} against float64, PyTorch's own {dense:.1e}")


def kernel_table(device: torch.device) -> list[str]:
    """What would be used on a device, one line per head dim."""
    rows = [["head dim", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]]
    for dim in HEAD_DIMS:
        found = [select_kernel(device, dtype, dim) for dtype in DTYPES]
        rows.append([str(dim), *(_cell(kernel) for kernel in found)])
    return format_table(rows)


def _cell(kernel: Kernel | str) -> str:
    return f"dense: {kernel}" if isinstance(kernel, str) else f"{kernel.name} {kernel.tile.q}x{kernel.tile.k}"
