"""Counters that the workers of a persistent kernel take programs by, and leave at zero when they are done."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

WORDS = 2
"""int32 words of a counter: programs that were taken, and workers that are done."""
IN_ONE_BUFFER = 4096


class WorkCounters:
    """One counter per state and stream: calls that share both run one after the other, others may run at once.

    A kernel counts on zeros, and two at once on one counter would leave other numbers there, for all calls to come.
    Eight bytes each, they are kept for as long as the process lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []
        self._found: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.Lock()

    def of(self, state_address: int, stream: int) -> Tensor:
        """int32 `[WORDS]`, zeros between calls."""
        found = self._found.get((state_address, stream))
        return self._find(state_address, stream) if found is None else found

    def _find(self, state_address: int, stream: int) -> Tensor:
        with self._lock:
            if not self._free:
                if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    # In the graph's memory, for this call alone: each replay writes the zeros again.
                    return torch.zeros(WORDS, dtype=torch.int32, device=self._device)
                with ThreadPoolExecutor(1) as other_thread:
                    self._free = other_thread.submit(_allocate, self._device).result()
            return self._found.setdefault((state_address, stream), self._free.pop())


def _allocate(device: torch.device) -> list[Tensor]:
    """Counters to keep; in a thread of its own.

    What a thread allocates while it warms a CUDA graph up lies in the memory of graphs, which those recorded later may
    take for theirs; nor is a thread of its own in inference mode. Copied rather than filled, since a copy from the host
    is waited for: calls on other streams find zeros, too.
    """
    return list(torch.zeros(IN_ONE_BUFFER, WORDS, dtype=torch.int32).to(device))
