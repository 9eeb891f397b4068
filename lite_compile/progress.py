"""A progress bar for what takes more than a few seconds; it goes to stderr, and only to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """`items`, one after another, with a bar of tqdm's, or a plain counter where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _counted(items, what)
    else:
        yield from tqdm(items, desc=what, file=sys.stderr, leave=False, disable=None)


def _counted(items: Sequence[Item], what: str) -> Iterator[Item]:
    shown = sys.stderr.isatty()
    for number, item in enumerate(items):
        if shown:
            print(f"\r{what}: {number + 1} of {len(items)}", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
