"""`liteattention bench`: one attention call on this machine, proved right and then timed against PyTorch's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from ..attention_bench import BenchRow, Shape, WrongResultError, bench_attention
from ..decisions import format_table
from ..environment import describe_environment
from ..errors import CommandError
from ..kernels.select_kernel import Kernel, select_kernel
from ..progress import progress

HELP = "Time one attention call with imposed skip masks against PyTorch's attention, after proving it right."
SHAPES: dict[str, Shape] = {"cpu": (1, 6, 4096, 64), "cuda": (1, 12, 32760, 128)}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--shape", nargs=4, type=_number(1), metavar=("B", "H", "S", "D"),
        help="batch, heads, tokens, head dim (default: 1 6 4096 64 on a CPU, 1 12 32760 128 on a GPU)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--kernel", default="auto", help="default: the fastest that serves")
    parser.add_argument(
        "--skipped", nargs="+", type=_percent, default=[0.0, 42.0, 77.0], metavar="PERCENT",
        help="shares of the tiles to skip (default: 0 42 77)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_number(1), help="timed calls (default: 5 on a CPU, 40 on a GPU)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Print a table; 1 if a result is wrong."""
    device = pick_device(args.device)
    shape: Shape = tuple(args.shape) if args.shape else SHAPES[device.type]
    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    kernel = select_kernel(device, dtype, shape[3], args.kernel)
    if isinstance(kernel, str):
        raise CommandError(f"no kernel for {dtype}, head dim {shape[3]} on {device}: {kernel}")
    repeats = args.repeats or (5 if device.type == "cpu" else 40)
    environment = describe_environment()
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else environment["CPU"]
    print(f"{place}; torch {torch.__version__}, triton {environment['triton']}")
    print(f"B={shape[0]} H={shape[1]} S={shape[2]} D={shape[3]} {str(dtype).removeprefix('torch.')}, {_about(kernel)}")
    how = f"fastest of {repeats} calls, taking turns" if device.type == "cpu" else f"median of {repeats} launches"
    print(f"{how}, against scaled_dot_product_attention with nothing skipped", flush=True)
    torch.manual_seed(0)
    rows: list[BenchRow] = []
    try:
        for percent in progress(args.skipped, "skipped shares"):
            rows.append(bench_attention(shape, dtype, device, kernel, percent / 100, repeats))
    except WrongResultError as error:
        print(f"\n{error}; no times are given. Please report it.")
        return 1
    except torch.OutOfMemoryError as error:
        raise CommandError(f"out of memory on {device}; give a smaller --shape") from error
    print("\n" + "\n".join(table(rows)))
    if args.json:
        write_json(args.json, environment, shape, dtype, kernel, rows)
    return 0


def table(rows: list[BenchRow]) -> list[str]:
    """The numbers as aligned lines."""
    header = ["skipped", "ms", "ms dense", "dense / ours", "error", "error dense"]
    numbers = [
        (f"{r.skipped:.1%}", f"{r.ms:.3f}", f"{r.dense_ms:.3f}", f"{r.dense_ms / r.ms:.2f}", f"{r.error:.1e}",
         f"{r.dense_error:.1e}")
        for r in rows
    ]  # fmt: skip
    return format_table([header, *numbers])


def pick_device(given: str | None) -> torch.device:
    """The device to measure on."""
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except Exception as error:  # RuntimeError, AssertionError: it depends on the device
        raise CommandError(f"--device is {given!r}: {str(error).splitlines()[0]}") from error
    if device.type not in SHAPES:
        raise CommandError(f"--device is {given!r}; allowed: cpu, cuda")
    return device


def write_json(
    path: str, environment: dict[str, str], shape: Shape, dtype: torch.dtype, kernel: Kernel, rows: list[BenchRow]
) -> None:
    """The numbers and what they depend on."""
    record = {
        "environment": environment, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel.name,
        "tile": kernel.tile, "rows": [row._asdict() for row in rows],
    }  # fmt: skip
    try:
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error


def _about(kernel: Kernel) -> str:
    return f"kernel {kernel.name!r}, tiles of {kernel.tile.q}x{kernel.tile.k}"


def _number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {minimum} on")
        return value

    return parse


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 100")
    return value
