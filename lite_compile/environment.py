"""What a result depends on beside the code: versions, processor, GPUs and their driver."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch


def describe_environment() -> dict[str, str]:
    """Name and value of each, in the order in which they are shown."""
    found = {
        "lite-compile": installed_version("lite-compile"),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "CPU": f"{cpu_name()}, {torch.get_num_threads()} threads",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"compute capability {properties.major}.{properties.minor}"
        found[f"GPU {index}"] = f"{properties.name}, {memory:.0f} GiB, {capability}"
    if torch.cuda.device_count():
        found["driver"] = f"{driver_version() or 'unknown'}, torch is built for CUDA {torch.version.cuda}"
    return found


def installed_version(package: str) -> str:
    """Version of an installed package, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's model, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """Version of NVIDIA's driver, from `nvidia-smi`; None if that does not answer."""
    lines = nvidia_smi("driver_version")
    return lines[0] if lines else None


def nvidia_smi(field: str) -> list[str]:
    """What `nvidia-smi` says of that field, one line per GPU; nothing without the command or a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
