"""Types of command-line arguments that the examples share: what is wrong becomes one line, not a traceback."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LARGEST = 2**31 - 1


@contextmanager
def blame(option: str, parser: argparse.ArgumentParser) -> Iterator[None]:
    """Where what goes wrong is the fault of what was given for `option`."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        parser.error(f"argument {option}: {error}")


def at_least(minimum: int) -> Callable[[str], int]:
    """argparse type: an integer from `minimum` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= LARGEST:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer from {minimum} to {LARGEST}")
        return value

    return parse


def finite(text: str) -> float:
    """argparse type: a number, neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def positive(text: str) -> float:
    """argparse type: a finite number above zero."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def usable_device(text: str) -> torch.device:
    """argparse type: a device that tensors can be made on here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found).cpu()
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError: it depends on the device
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from error
    return found


def existing_file(text: str) -> Path:
    """argparse type: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)
