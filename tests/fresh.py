"""Run a function in a process that has imported everything and computed nothing."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from models import DEVICE

# Forked processes start fast, but cannot use CUDA once an import has touched it.
_context = multiprocessing.get_context("forkserver" if DEVICE.type == "cpu" else "spawn")
_context.set_forkserver_preload(["torch", "torch._dynamo", "diffusers", "lite_compile", "models", "fresh"])


def _serve(function: Callable[..., torch.Tensor], args: tuple[Any, ...], threads: int, result: Connection) -> None:
    torch.set_num_threads(threads)
    output = function(*args)
    result.send((output.cpu().double().numpy(), output.dtype))


@contextmanager
def _working_directory(path: Path) -> Iterator[None]:
    """New interpreters import from their working directory first; the repository's root would shadow the package."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def in_fresh_process(function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """`function(*args)` computed in a fresh process; `function` is a module-level function that returns one tensor."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_serve, args=(function, args, torch.get_num_threads(), sender))
    with _working_directory(Path(__file__).parent):
        process.start()
    sender.close()
    try:
        array, dtype = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in the fresh process; its traceback is above") from None
    finally:
        process.join()
    return torch.from_numpy(array).to(DEVICE, dtype)
